"""Weights that come and go: the same bits, each rank storing its part, one block whole at a time."""

from __future__ import annotations

import pytest
import torch
from tiny import DEPTH, alone, make, tiny_model
from torch import nn

from meshdiff import Layout, Pipeline, init_mesh, simulate
from meshdiff.distributed import weight_streaming
from meshdiff.distributed.released_weight import ReleasedWeight
from meshdiff.distributed.simulation import on_each_rank, rank_values
from meshdiff.distributed.weight_streaming import Storage, Streamed, stream


def stored_bytes(pipeline: Pipeline) -> list[int]:
    """Of each rank."""
    modules = [m for m in pipeline.model.transformer.modules() if isinstance(m, Streamed)]
    parts = [rank_values(module.weights._stored) for module in modules]
    return [sum(values[rank % len(values)].nbytes for values in parts) for rank in range(pipeline.mesh.size())]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 2), Layout(1, 5)], ids=str)
def test_each_rank_stores_its_part_and_nothing_more(layout, offload):
    model = tiny_model()
    names = [name for name, _ in model.transformer.named_parameters()]
    whole = sum(parameter.nbytes for parameter in model.transformer.parameters())
    with simulate(layout.world_size):
        pipeline = Pipeline(model, init_mesh(layout, "cpu"), shard_weights=True, offload=offload)
        slack = len(names) * 64 * layout.world_size  # of alignment
        for own in stored_bytes(pipeline):
            assert whole / layout.world_size <= own <= (whole + slack) / layout.world_size
    left = [name for name, weight in model.transformer.named_parameters() if not isinstance(weight, ReleasedWeight)]
    assert left == []


@pytest.mark.parametrize("options", [{"shard_weights": True}, {"offload": True}], ids=lambda o: next(iter(o)))
def test_the_clip_is_the_same_to_the_bit(options):
    with alone():
        expected, _ = make(Layout(), 2)
    with simulate(3):
        video, _ = make(Layout(1, 3), 2, **options)
    assert torch.equal(video, expected)


def test_the_clip_is_wrong_when_one_rank_stores_something_else(monkeypatch):
    store = weight_streaming._stored_part

    @on_each_rank
    def damage(shard: torch.Tensor, rank: int) -> torch.Tensor:
        return shard ^ 1 if rank == 1 else shard

    def store_badly(parameters, starts, total, storage):
        return damage(store(parameters, starts, total, storage), storage.divided.get_local_rank())

    with alone():
        expected, _ = make(Layout(), 2)
    monkeypatch.setattr(weight_streaming, "_stored_part", store_badly)
    with simulate(3):
        video, _ = make(Layout(1, 3), 2, shard_weights=True)
    assert not torch.equal(video, expected)


class Recorder(nn.Module):
    """A layer that says when it runs, and which layers' weights are whole, or on their way, at that time."""

    def __init__(self, log: list) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.scale = nn.Parameter(torch.full((5,), 2.0))
        self.log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight.dtype == torch.bfloat16
        self.log.append(present(self.log[0]))
        return x * self.scale * self.weight[0].float()


def present(layers: nn.Sequential) -> list[str]:
    def state(layer: Streamed) -> str:
        if not isinstance(layer.scale, ReleasedWeight):
            return "here"
        return "-" if layer.weights._coming is None else "coming"

    return [state(layer) for layer in layers]


def test_the_next_weights_are_on_their_way_while_a_module_runs():
    log: list = []
    layers = nn.Sequential(*(Recorder(log) for _ in range(3)))
    log.append(layers)
    stream(layers, [["0", "1", "2"]], lambda names: None, Storage(torch.device("cpu"), on_host=True))
    for _ in range(2):
        assert torch.equal(layers(torch.ones(5)), torch.full((5,), 8.0))
    once = [["here", "coming", "-"], ["-", "here", "coming"], ["-", "-", "here"]]
    assert log[1:] == once * 2
    assert present(layers) == ["-"] * 3


def test_weights_leave_when_a_module_fails():
    layers = nn.Sequential(nn.Linear(2, 3))
    stream(layers, [["0"]], lambda names: None, Storage(torch.device("cpu"), on_host=True))
    with pytest.raises(RuntimeError):
        layers(torch.ones(5))
    assert isinstance(layers[0].weight, ReleasedWeight)
    assert layers(torch.ones(2)).shape == (3,)


def test_weights_are_put_on_a_mesh_once():
    model = tiny_model()
    with simulate(2):
        mesh = init_mesh(Layout(1, 2), "cpu")
        pipeline = Pipeline(model, mesh, shard_weights=True)
        with pytest.raises(ValueError, match="on a mesh already"):
            Pipeline(model, mesh)
        assert len([m for m in pipeline.model.transformer.blocks if isinstance(m, Streamed)]) == DEPTH
