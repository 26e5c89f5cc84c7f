"""The smallest programs for which DTensor is wrong, or raises: why `op_traits.py` and handlers keep operations from it.

Each is expected to fail. One that passes tells that torch has mended its rule, and that what its entry names can go.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from meshdiff import Layout, autoshard, init_mesh, place, simulate
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.simulation import outside, unwrap

SEED = 0
MEASURED = (2, 13)
"""The version of torch that the programs were found with; in others, other rules may be wrong: -rX shows them."""


class Wrong(Exception):
    """DTensor does otherwise than one device."""


@dataclass(frozen=True)
class Program:
    """A function of one tensor.

    Attributes:
        run: takes a tensor that is sharded along dim 1, or a plain one, and returns another.
        shape: of the tensor. 2 ranks do not divide 5, and the second of them has no row of 1.
        only: "simulated" or "ranks" if it is run only there: what one rank alone raises has others wait, and what
            gloo does is no part of a simulation.
        exact: results are to be equal to the bit.
        fault: of DTensor, or a part of it, so that no other one is taken for it.
    """

    run: Callable[[Tensor], Tensor]
    shape: tuple[int, ...] = (2, 5, 6)
    only: str = ""
    exact: bool = False
    fault: str = " off"


WRONG: dict[str, Program] = {}


def wrong(name: str, *shape: int, **options: Any) -> Callable[[Any], Any]:
    """Register the program below, with these attributes of a `Program`."""

    def register(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        WRONG[name] = Program(run, shape or Program.shape, **options)
        return run

    return register


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x.requires_grad_()
    function(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


# Reductions along the sharded dim.

for reduction in ("amax", "amin", "argmax", "argmin"):

    @wrong(f"{reduction} of one row", 2, 1, 6, only="simulated", fault="Expected reduction dim")
    def _(x: Tensor, reduction: str = reduction) -> Tensor:
        """The rank that has no row raises."""
        return getattr(x, reduction)(1)


for reduction in ("max", "min"):

    @wrong(f"{reduction} of one row", 2, 1, 6, only="simulated", fault="Expected reduction dim")
    def _(x: Tensor, reduction: str = reduction) -> Tensor:
        """The rank that has no row raises."""
        return getattr(x, reduction)()


@wrong("amax of a NaN", only="ranks")
def _(x: Tensor) -> Tensor:
    """gloo loses a NaN of all ranks but the first."""
    to_last = x - x[:, 4:]
    return (to_last / to_last).amax(1)


@wrong("vector norm of one row", 2, 1, 6, only="simulated", fault="this dimension is empty")
def _(x: Tensor) -> Tensor:
    """The rank that has no row raises."""
    return torch.linalg.vector_norm(x, float("inf"), dim=1)


@wrong("sum of a vector norm")
def _(x: Tensor) -> Tensor:
    """Norms of parts are added up before they are joined."""
    return torch.linalg.vector_norm(x, dim=1).sum()


@wrong("number of any")
def _(x: Tensor) -> Tensor:
    """It counts the ranks that have one."""
    return (x > 0).any(1) * 1.0


@wrong("mean in another order", 2, 6, 6, exact=True)
def _(x: Tensor) -> Tensor:
    """Each rank's mean is averaged, which is not to the bit what one device computes."""
    return x.mean(1)


for spread in ("var", "std"):

    @wrong(f"gradient of {spread} in another order", 2, 4, 6, exact=True)
    def _(x: Tensor, spread: str = spread) -> Tensor:
        """It takes the mean of each rank's means."""
        return gradient(lambda y: getattr(y, spread)(1), x)


@wrong("cumsum along a negative dim")
def _(x: Tensor) -> Tensor:
    """Each rank begins at zero."""
    return x.cumsum(-2)


@wrong("argmax of a strided shard", 2, 4, 6, fault="does not support _StridedShard")
def _(x: Tensor) -> Tensor:
    """A dim that was merged with the sharded one."""
    return x.flatten(0, 1).argmax(0)


# Views of a part of the sharded dim, which are copies there.


@wrong("write to a slice")
def _(x: Tensor) -> Tensor:
    x[:, 1:3].mul_(2)
    return x * 1


@wrong("write to a row")
def _(x: Tensor) -> Tensor:
    x.select(1, 3).mul_(2)
    return x * 1


@wrong("write to a part of a split")
def _(x: Tensor) -> Tensor:
    x.split([1, 4], 1)[1].mul_(2)
    return x * 1


@wrong("write to a chunk")
def _(x: Tensor) -> Tensor:
    x.chunk(3, 1)[1].mul_(2)
    return x * 1


@wrong("write to complex numbers of one row", 2, 1, 6)
def _(x: Tensor) -> Tensor:
    torch.view_as_complex(x.unflatten(2, (3, 2))).mul_(2)
    return x * 1


@wrong("rows by unbind", fault="Attempted to unbind along the sharded dimension")
def _(x: Tensor) -> Tensor:
    return x.unbind(1)[3]


@wrong("write of a number", fault="aten.fill_.Tensor does not have a sharding strategy")
def _(x: Tensor) -> Tensor:
    x[:, 1:3] = 2.0
    return x * 1


@wrong("gradient of a part of a split", fault="got mixed torch.Tensor and DTensor")
def _(x: Tensor) -> Tensor:
    """Of the part that is not used, autograd makes a plain tensor."""
    return gradient(lambda y: y.split([2, 4], 2)[0], x)


@wrong("gradient of a part of an unbind", fault="got mixed torch.Tensor and DTensor")
def _(x: Tensor) -> Tensor:
    """Of those that are not used, autograd makes plain tensors."""
    return gradient(lambda y: y.unbind(2)[0], x)


# Random numbers, sums of which ranks hold parts, nothing at all, and shapes.


@wrong("dropout")
def _(x: Tensor) -> Tensor:
    """Each rank draws for its shard what one device draws for the first."""
    torch.manual_seed(SEED)
    return F.dropout(x)


@wrong("constant in a partial sum")
def _(x: Tensor) -> Tensor:
    return x.sum(1).fill_(1)


@wrong("write to a partial sum", fault="in-place operations that require placement changes")
def _(x: Tensor) -> Tensor:
    return x.sum(1).add_(1)


@wrong("number of a partial sum", only="ranks")
def _(x: Tensor) -> Tensor:
    """Every rank reads its own part."""
    return torch.tensor(x.sum().item())


@wrong("view of nothing", 2, 0, 6, fault="it has not ended")
def _(x: Tensor) -> Tensor:
    """It never ends."""
    with no_longer_than(2):
        return x.flatten()


@wrong("new shape in place", fault="aten.unsqueeze_.default does not have a sharding strategy")
def _(x: Tensor) -> Tensor:
    return x.unsqueeze_(0)


@wrong("linear of one row", 2, 1, 6, fault="would remove or reshape sharded dimension 1")
def _(x: Tensor) -> Tensor:
    weight = torch.ones(4, 6)
    return F.linear(x, place(weight, x.device_mesh, [Replicate()]) if isinstance(x, DTensor) else weight)


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise TimeoutError(f"it has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fault(program: Program, mesh: DeviceMesh) -> str:
    """Describe what DTensor does otherwise than one device; "" if it does the same."""
    with outside():
        given = torch.randn(program.shape, generator=torch.Generator().manual_seed(SEED))
        expected = program.run(given.clone())
    sharded = place(given, mesh, [Shard(1)])
    try:
        found = program.run(sharded)
        found = unwrap(found.full_tensor() if isinstance(found, DTensor) else found)
    except Exception as error:
        return f"raises {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"is {found.dtype} {tuple(found.shape)} for {expected.dtype} {tuple(expected.shape)}"
    with outside():
        off = difference(found.double(), expected.double())
    return f"is {off:.1e} off" if off > (0 if program.exact else 1e-6) else ""


def where(place: str) -> list[str]:
    """Names of the programs that are run in this place."""
    return [name for name, program in WRONG.items() if program.only in ("", place)]


def on_this_rank() -> dict[str, list[str]]:
    """Each program's faults by its name, one for each rank."""
    mesh = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"]
    return {name: all_gather_object(fault(WRONG[name], mesh)) for name in where("ranks")}


def cases(place: str) -> list[Any]:
    """Programs that are run there as parameters; one that passes is an error."""
    strict = tuple(map(int, torch.__version__.split(".")[:2])) == MEASURED
    return [
        pytest.param(name, marks=pytest.mark.xfail(raises=Wrong, strict=strict, reason=WRONG[name].run.__doc__ or name))
        for name in where(place)
    ]


def test_the_library_says_what_each_program_is_the_reason_for():
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(autoshard.__file__).parent.rglob("*.py"))
    assert [name for name in WRONG if f'"{name}"' not in sources] == []


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> dict[str, list[str]]:
    return run_on_ranks(on_this_rank, 2, tmp_path_factory.mktemp("rules"))


def check(name: str, found: str) -> None:
    """Raise `Wrong` for the fault of a program.

    Raises:
        AssertionError: if it is another one.
    """
    if found:
        assert WRONG[name].fault in found
        raise Wrong(found)


@pytest.mark.parametrize("name", cases("simulated"))
def test_a_rule_of_dtensor_simulated(name):
    with simulate(2):
        found = fault(WRONG[name], init_mesh(Layout(cp=2), "cpu")["cp"])
    check(name, found)


@pytest.mark.parametrize("name", cases("ranks"))
def test_a_rule_of_dtensor_on_ranks(name, of_ranks):
    for found in of_ranks[name]:
        check(name, found)
