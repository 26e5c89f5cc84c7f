"""Outputs of calls that have not run yet, which are of use as those of one device are."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import convert_to_fp32
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from meshdiff import Layout, init_mesh
from meshdiff.autoshard import Guidance
from meshdiff.autoshard.cfg.deferred import OutputForm
from tests.autoshard.test_patches import Twice

R = torch.arange(6.0).view(2, 3)


def set_data(u: Tensor) -> Tensor:
    other = torch.zeros(2, 3)
    other.data = u
    return other


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a * 2


USES: dict[str, Callable[[Tensor], Any]] = {
    "operator": lambda u: u + 1,
    "of a number": lambda u: 1 - u,
    "method": lambda u: u.mul(2),
    "in place": lambda u: u.mul_(2),
    "out": lambda u: torch.add(R, u, out=torch.empty(2, 3)),
    "written": lambda u: torch.zeros(2, 3).copy_(u),
    "item": lambda u: torch.zeros(2, 3).index_copy_(0, torch.arange(2), u),
    "list of": lambda u: torch.stack([u, u]),
    "attribute": lambda u: torch.ones(u.shape, dtype=u.dtype, device=u.device) * u,
    "iteration": lambda u: torch.stack(list(u)),
    "index": lambda u: u[0],
    "number": lambda u: float(u.sum()),
    "words": lambda u: f"{u} {u!r}",
    "tolist": lambda u: u.tolist(),
    "numpy": lambda u: np.add(u, 1),
    "array": lambda u: np.asarray(u),
    "torch.tensor": lambda u: torch.tensor(u),
    "as_tensor": lambda u: torch.as_tensor(u) * 1,
    "dlpack": lambda u: torch.from_dlpack(u) * 1,
    "data": lambda u: u.data * 1,
    "pytree": lambda u: tree_map(lambda t: t * 2, [u])[0],
    "fp32 of accelerate": lambda u: convert_to_fp32((u.double(),))[0],
    "dataclass": lambda u: dataclasses.replace(Transformer2DModelOutput(sample=u)).sample * 2,
    "vmap": lambda u: torch.func.vmap(lambda a: 2 * a)(u),
    "grad": lambda u: torch.func.grad(lambda a: (a**2).sum())(u),
    "compiled": lambda u: torch.compile(lambda a: a * 2, backend="eager")(u),
    "autograd function": lambda u: Function.apply(u),
    "functional_call": lambda u: torch.func.functional_call(nn.ReLU(), {}, (u,)),
    "copied": lambda u: copy.deepcopy(u),
    "pickled": lambda u: pickle.loads(pickle.dumps(u)),
    "buffer": lambda u: nn.Buffer(u) * 1,
    "pointer": lambda u: u.data_ptr() > 0,
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("use", USES)
def test_an_output_that_has_not_run_is_of_use_for_everything(use):
    torch._dynamo.reset()
    runs: list[int] = []
    deferred = OutputForm.of((R,)).deferred(lambda: runs.append(1) or (R.clone(),))
    assert type(deferred) is tuple
    found, expected = USES[use](deferred[0]), USES[use](R.clone())
    assert runs
    assert torch.equal(found, expected) if isinstance(expected, Tensor) else np.all(found == expected)
    assert not isinstance(found, Tensor) or type(found) is type(expected)


@torch.no_grad()
def test_what_takes_memory_without_asking_raises():
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        set_data(OutputForm.of((R,)).deferred(lambda: (R,))[0])


@torch.no_grad()
@pytest.mark.parametrize("returns", ["tuple", "tensor", "output"])
def test_an_output_is_a_plain_one_once_the_next_call_is_there(returns):
    twice, world = Twice(), init_mesh(Layout(), "cpu")["cfg"]
    guidance = Guidance(twice, world)
    form = OutputForm.of(twice(R, returns))
    first = form.deferred(lambda: twice(R, returns))
    for tensor in [first] if returns == "tensor" else first.values() if returns == "output" else first:
        computed = twice(R)[0]
        assert tensor.become(computed)
        assert type(tensor) is Tensor
        assert torch.equal(tensor, R * 2)
        assert torch.equal(computed, R * 2)  # whose it was, has it still
    if returns == "output":
        assert type(first) is Transformer2DModelOutput
        first.extra = 1
        assert dataclasses.replace(first).sample is first.sample
    if returns == "tuple":
        assert (*first, 1)[1] == 1
    guidance.remove()
    dist.destroy_process_group()
