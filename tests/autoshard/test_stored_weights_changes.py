"""Changes of weights that are stored in parts or in host memory: refused, kept, or undone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from weight_kinds import CHANNELS, Model

from meshdiff.autoshard.stored_weights import StoredWeights
from meshdiff.distributed.weight_streaming import Storage

CPU = torch.device("cpu")
TOKENS = torch.randn(1, 7, CHANNELS, generator=torch.Generator().manual_seed(0))


def output(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module(TOKENS)[0]


CHANGES = {
    "a write": lambda model: nn.init.zeros_(model.head.weight),
    "a write to data": lambda model: model.head.weight.data.mul_(2),
    "other data": lambda model: setattr(model.head.weight, "data", torch.zeros(CHANNELS, CHANNELS)),
    "another parameter": lambda model: setattr(model.head, "weight", nn.Parameter(torch.zeros(CHANNELS, CHANNELS))),
    "another dtype": lambda model: model.to(torch.bfloat16),
    "no memory": lambda model: model.to("meta"),
    "weights of a file": lambda model: model.load_state_dict(Model().state_dict()),
    "weights of a file, assigned": lambda model: model.load_state_dict(Model().state_dict(), assign=True),
    "shared memory": lambda model: model.share_memory(),
    "memory of another library": lambda model: torch.utils.dlpack.from_dlpack(model.head.weight),
    "training": lambda model: model.requires_grad_(True),
    "training of one": lambda model: setattr(model.head.weight, "requires_grad", True),
    "saving": lambda model: torch.save(model.state_dict(), io.BytesIO()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_weights_raises_then_or_in_the_next_call(name):
    module = Model().requires_grad_(False)
    StoredWeights(module, Storage(CPU, on_host=True))

    def change_and_call() -> None:
        CHANGES[name](module)
        module(TOKENS)

    with pytest.raises(RuntimeError, match=r"(which|a weight that) is divided between"):
        change_and_call()


def test_what_changes_nothing_is_allowed():
    module = Model()
    expected = output(module)
    StoredWeights(module, Storage(CPU, on_host=True))
    module.to("cpu").to(torch.float32).eval().requires_grad_(False)
    assert torch.equal(output(copy.deepcopy(module)), expected)
    with torch.inference_mode():
        assert torch.equal(module(TOKENS)[0], expected)
    assert sum(parameter.nbytes for parameter in module.parameters()) == sum(p.nbytes for p in Model().parameters())
    assert module.head.weight.sum() == Model().head.weight.sum()


def test_weights_are_put_back_as_they_were():
    module = Model()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in module.named_parameters()}
    stored = StoredWeights(module, Storage(CPU, on_host=True))
    with pytest.raises(ValueError, match="stored elsewhere already"):
        StoredWeights(module, Storage(CPU, on_host=True))
    stored.remove()
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert stored.stored_bytes == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_block_that_writes_to_its_own_weight_raises(context):
    module = Model().requires_grad_(False)
    module.blocks[1].use = lambda block, made: made * block.attn_out.bias.add_(1)
    StoredWeights(module, Storage(CPU, on_host=True))
    with context(), pytest.raises(RuntimeError, match="wrote to one of its own weights while it ran"):
        module(TOKENS)
    module.blocks[1].use = None
    assert module(TOKENS)[0].isfinite().all()


def test_a_weight_that_was_assigned_stays_when_the_others_are_put_back():
    module = Model()
    stored = StoredWeights(module, Storage(CPU, on_host=True))
    module.head.weight = other = nn.Parameter(torch.zeros(CHANNELS, CHANNELS))
    with torch.no_grad(), pytest.raises(RuntimeError, match="the weight of a Linear was replaced"):
        module(TOKENS)
    stored.remove()
    stored.remove()
    assert module.head.weight is other
    assert torch.equal(module.head.bias, Model().head.bias)


def test_a_stand_in_that_is_put_back_is_as_before():
    module = Model()
    expected = output(module)
    StoredWeights(module, Storage(CPU, on_host=True))
    released, module.head.weight = module.head.weight, nn.Parameter(torch.zeros(CHANNELS, CHANNELS))
    with torch.no_grad(), pytest.raises(RuntimeError, match="was replaced"):
        module(TOKENS)
    module.head._parameters["weight"] = released
    assert torch.equal(output(module), expected)
