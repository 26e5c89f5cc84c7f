"""Random programs on a mesh, untouched: each gives what it gives on one device, or one clear error.

A drawn module is a few lines of Python on a pool of named tensors: what models
do to tokens, and what none should. A line that one device would not run, or at
which rounding shows, is not taken, so what is compared is well defined.

The suite draws the same programs each time. By hand, ten times as many, other ones, with statistics:

pytest tests/autoshard/test_drawn.py --draws 10 -n 0 -s
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draws
import hypothesis
import pytest
import torch
from drawn_models import cases
from drawn_programs import Case, build, copies, error, inputs_of, loss
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

import meshdiff
from meshdiff import Layout, init_mesh, simulate
from meshdiff.autoshard import parallelize
from meshdiff.distributed.simulation import unwrap

SEEDS = (1, 2, 3, 4)
"""Of tests that run beside each other, with 50 programs each."""
OUTPUT, GRADIENT = 1e-5, 1e-4
"""Relative errors that pass, in float32."""


@dataclass
class Call:
    """What a call leaves."""

    output: Any
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def call(module: nn.Module, run: Callable, inputs: dict[str, Tensor], gradient: bool) -> Call:
    module.zero_grad()
    with torch.enable_grad() if gradient else torch.no_grad():
        output = run(**inputs)
        if gradient:
            total = loss(output)
            if total.requires_grad:
                total.backward()
    leaves = [*module.named_parameters(), *inputs.items()] if gradient else []
    gradients = {name: tensor.grad for name, tensor in leaves}
    made = (*tree_map_only(Tensor, torch.detach, (output, inputs)), gradients)
    return Call(*tree_map_only(Tensor, lambda t: unwrap(t).clone(), made))


def is_well_posed(expected: Call, exact: Call) -> bool:
    """Whether float32 is near enough to float64 for a difference from it to mean anything."""
    pairs = zip(tree_leaves(expected.output), tree_leaves(exact.output), strict=True)
    far = any(isinstance(one, Tensor) and error(one, other) > 2e-6 for one, other in pairs)
    grads = [(one, exact.gradients[name]) for name, one in expected.gradients.items() if one is not None]
    return not far and all(error(one, other) < 1e-5 for one, other in grads)


def check(got: Call, expected: Call) -> None:
    leaves, structure = tree_flatten(got.output)
    expected_leaves, expected_structure = tree_flatten(expected.output)
    assert structure == expected_structure, "the output has another structure"
    for one, other in zip(leaves, expected_leaves, strict=True):
        if not isinstance(other, Tensor):
            assert one == other
            continue
        assert type(one) is Tensor, f"the output has {type(one)}, {one.dtype}"
        assert one.dtype == other.dtype, f"the output has {type(one)}, {one.dtype}"
        assert one.shape == other.shape, f"an output is {tuple(one.shape)} instead of {tuple(other.shape)}"
        assert error(one, other) <= OUTPUT, f"an output is off by {error(one, other):.1e}"
    for name, other in expected.inputs.items():
        assert error(got.inputs[name], other) <= OUTPUT, f"the caller's {name} is off"
    for name, other in expected.gradients.items():
        one = got.gradients[name]
        assert (one is None) == (other is None), f"the gradient of {name} is {one} instead of {other}"
        assert one is None or (type(one) is Tensor and error(one, other) <= GRADIENT), (
            f"the gradient of {name} is off by {error(one, other):.1e}"
        )


def is_clear(refusal: Exception) -> bool:
    """One line, from meshdiff."""
    last = traceback.extract_tb(refusal.__traceback__)[-1].filename
    ours = Path(last).is_relative_to(Path(meshdiff.__file__).parent)
    return type(refusal) is RuntimeError and ours and "\n" not in str(refusal)


class Statistics(Counter):
    """How draws came out."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def __str__(self) -> str:
        total = max(1, sum(self.values()))
        counts = ", ".join(f"{kind} {count} ({100 * count / total:.0f}%)" for kind, count in self.most_common())
        return f"{total} draws: {counts}; {sum(self.shares) / max(1, len(self.shares)):.0%} of FLOPs on shards"


def outcome(case: Case, statistics: Statistics) -> str:
    """The outcome of a case: on shards, blocks replicated, replicated, refused; "ill-posed" if nothing is known."""
    module = build(case.sources)
    inputs = inputs_of(case.sizes, case.rotary, case.mask)
    second = {k: v * -0.7 if case.other_values and v.is_floating_point() else v for k, v in inputs.items()}
    expected = []
    for values in (inputs, second):
        try:
            plain = call(module, module, copies(values, gradient=case.gradient), case.gradient)
        except Exception:  # its own, with other values
            return "ill-posed"
        twin = build(case.sources, double=True)
        if not is_well_posed(plain, call(twin, twin, copies(values, True, case.gradient), case.gradient)):
            return "ill-posed"
        expected.append(plain)
    module.zero_grad()
    # The first call finds out what runs how, the second is the first to go by it, the third does it again.
    given = [copies(values, gradient=case.gradient) for values in (inputs, second, inputs)]
    with simulate(case.ranks):
        handle = parallelize(module, init_mesh(Layout(1, case.ranks), "cpu")["cp"])
        for values, plain in zip(given, [*expected, expected[0]], strict=True):
            try:
                got = call(module, handle, values, case.gradient)
            except Exception as refusal:
                if is_clear(refusal):
                    return "refused"
                raise
            check(got, plain)
    if handle.replicated_kinds:
        return "replicated" if "" in handle.replicated_kinds else "blocks replicated"
    report = handle.report()
    if sum(block.flops_sharded + block.flops_replicated for block in report.blocks):
        statistics.shares.append(report.sharded_share)
    return "on shards" if any(block.sharded for block in report.blocks) else "nothing to share"


@contextmanager
def explained(case: Case) -> Iterator[None]:
    try:
        yield
    except Exception as failure:
        failure.add_note(str(case))
        raise


@pytest.fixture(scope="module")
def statistics():
    counted = Statistics()
    yield counted
    if draws.TIMES > 1:
        print(f"\n{counted}")


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_program_is_itself_on_a_mesh_or_says_clearly_that_it_cannot_be(seed, statistics):
    @settings(
        max_examples=draws.times(50),
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    @given(case=cases())
    def check_drawn(case: Case) -> None:
        with explained(case):
            kind = outcome(case, statistics)
        statistics[kind] += 1

    (hypothesis.seed(seed)(check_drawn) if draws.TIMES == 1 else check_drawn)()
