"""Gradients through weights that are stored in parts or in host memory."""

from __future__ import annotations

import pytest
import torch
from ranks import run_on_every_rank
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weight_kinds import CHANNELS, Model

from meshdiff import Layout, init_mesh, parallelize, simulate
from meshdiff.autoshard.stored_weights import StoredWeights
from meshdiff.distributed.released_weight import ReleasedWeight
from meshdiff.distributed.simulation import outside, unwrap
from meshdiff.distributed.weight_streaming import Storage

CPU = torch.device("cpu")
TOKENS = torch.randn(1, 7, CHANNELS, generator=torch.Generator().manual_seed(0))


class Adapted(nn.Module):
    """A frozen layer and an adapter that is trained."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.down = layer, nn.Linear(CHANNELS, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Checkpointed(Model):
    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False)
        return (self.head(tokens),)


def adapted(kind: type[Model] = Model) -> Model:
    torch.manual_seed(0)
    module = kind().requires_grad_(False)
    for block in module.blocks:
        block.attn_out = Adapted(block.attn_out)
    return module


def test_adapters_get_their_gradients_and_the_weights_are_not_kept_for_them():
    module, expected = adapted(), adapted()
    stored = StoredWeights(module, Storage(CPU, on_host=True))
    trained = {name for name, parameter in module.named_parameters() if not isinstance(parameter, ReleasedWeight)}
    assert trained == {f"blocks.{i}.attn_out.{part}.weight" for i in (0, 1) for part in ("down", "up")}
    expected(TOKENS)[0].square().sum().backward()
    (made,) = module(TOKENS)
    again: list[int] = []
    for number, weights in enumerate(stored._weights):
        weights._fetched = lambda number=number, fetch=weights._fetched: again.append(number) or fetch()
    made.square().sum().backward()
    assert again == [2, 1]  # before the first adapter nothing has a gradient
    for name in trained:
        assert torch.equal(module.get_parameter(name).grad, expected.get_parameter(name).grad)


def gradients_of_ranks(kind: type[Model]) -> dict[str, Tensor]:
    """The gradients of adapters in a model on a mesh, with divided weights."""
    with outside():
        module, tokens = adapted(kind), TOKENS.clone()
    mesh = init_mesh(Layout(1, torch.distributed.get_world_size()), "cpu")
    parallelize(module, mesh["cp"], shard_weights=True)
    module(tokens)[0].square().sum().backward()
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {name: unwrap(parameter.grad) for name, parameter in trained}


@pytest.mark.parametrize("kind", [Model, Checkpointed])
@pytest.mark.parametrize("ranks", [2, 3])
def test_adapters_get_their_gradients_on_ranks(ranks, kind, tmp_path):
    model = adapted()
    model(TOKENS)[0].square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    with simulate(ranks):
        simulated = gradients_of_ranks(kind)
    for found in [simulated, *run_on_every_rank(gradients_of_ranks, ranks, tmp_path, kind)]:
        torch.testing.assert_close(found, expected)


def test_a_checkpoint_around_a_block_still_computes_it_again():
    module = adapted(Checkpointed)
    StoredWeights(module, Storage(CPU, on_host=True))
    runs = []
    for block in module.blocks:
        block.to_qkv.register_forward_hook(lambda *given: runs.append(1))
    module(TOKENS.clone().requires_grad_(True))[0].sum().backward()
    assert len(runs) == 4


def test_weights_that_would_need_gradients_are_refused():
    module = Model()
    StoredWeights(module, Storage(CPU, on_host=True))
    with pytest.raises(RuntimeError, match=r"weights that are stored elsewhere get none; call it under torch.no_grad"):
        module(TOKENS)


def test_weights_that_would_need_gradients_are_refused_to_other_methods_as_well():
    module = Model()
    StoredWeights(module, Storage(CPU, on_host=True))
    with pytest.raises(RuntimeError, match="weights that are stored elsewhere get none"):
        module.blocks[0](TOKENS)


def test_a_frozen_table_in_a_model_that_nobody_has_frozen_changes_nothing():
    module = Model()
    module.blocks[0].attn_out.bias.requires_grad_(False)
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    stored = StoredWeights(module, Storage(CPU, on_host=True))
    assert stored.resident_bytes == 0
    stored.remove()
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == trained
