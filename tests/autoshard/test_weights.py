"""Weights that are no plain tensors, on a mesh: the model's own numbers, and a rank that holds another one is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_on_every_rank
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from weight_kinds import CHANNELS, KINDS, Model

from meshdiff import Layout, init_mesh
from meshdiff.autoshard.numerics import difference
from meshdiff.integrations.diffusers import parallelize

STEPS = 5
"""A call that finds out, one that is watched, one captured, one tried, one by its graph."""


def steps(model: Model) -> list[torch.Tensor]:
    """Outputs of guided steps, each of two calls."""
    given = torch.randn(2 * STEPS, 1, 7, CHANNELS, generator=torch.Generator().manual_seed(1))
    pairs = [(model(one)[0], model(other)[0]) for one, other in given.split(2)]
    return [one + 2 * other for one, other in pairs]


def on_mesh(name: str, mesh: DeviceMesh) -> tuple[float, str, str]:
    """The error, what became of captured calls, and what is told if rank 1 alone has another weight."""
    kind, (model, spoiled) = KINDS[name], (Model().requires_grad_(False), Model().requires_grad_(False))
    kind.prepare(model)
    kind.prepare(spoiled)
    expected = steps(model)
    parallel = parallelize(model, mesh, capture=True)
    error = difference(steps(model), expected)
    if torch.distributed.get_rank() == 1:
        kind.spoil(spoiled)
    parallelize(spoiled, mesh)
    try:
        spoiled(torch.ones(1, 7, CHANNELS))
        told = "nothing"
    except ValueError as raised:
        told = str(raised)
    return error, "".join(parallel.captured().values()), told


def replaced_inside(mesh: DeviceMesh) -> tuple[float, str]:
    """The error after a tensor has been replaced that a captured weight consists of."""
    model = Model().requires_grad_(False)
    KINDS["a class of their own"].prepare(model)
    parallel = parallelize(model, mesh["cp"], capture=True)
    steps(model)
    weight = model.blocks[0].to_qkv.weight
    weight.integers = weight.integers.flip(0)
    found, told = steps(model), "".join(parallel.captured().values())
    parallel.remove()
    return difference(found, steps(model)), told


def in_inference_mode(mesh: DeviceMesh) -> tuple[float, dict[str, str]]:
    """The error of calls in inference mode, in which the weights were made as well, and the replicated kinds."""
    with torch.inference_mode():
        model = Model().requires_grad_(False)
        expected = steps(model)
        (parallel,) = parallelize(model, mesh["cp"]).models.values()
        return difference(steps(model), expected), parallel.replicated_kinds


def sharded(model: Model, mesh: DeviceMesh, root: bool = True, **options: Any) -> Model:
    """By torch's FSDP2: weights are DTensors, which its hooks gather."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh) if root else model


def gradients_of_shards(mesh: DeviceMesh) -> tuple[float, float]:
    """Errors of the output and of the gradients after two backward passes, the weights on shards over `cp`."""
    alone, model = Model(), sharded(Model(), mesh["cp"])
    parallelize(model, mesh)
    given = torch.randn(2, 7, CHANNELS, generator=torch.Generator().manual_seed(1))
    apart = 0.0
    for _ in range(2):
        (expected,), (found,) = alone(given), model(given)
        apart = max(apart, difference(found.detach(), expected.detach()))
        expected.square().sum().backward()
        found.square().sum().backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return apart, max(difference(own.grad.full_tensor(), other.grad) for own, other in pairs)


def guided_on_shards(mesh: DeviceMesh) -> float:
    """The error of guided steps, the weights on shards over `cfg`."""
    expected = steps(Model())
    model = sharded(Model().requires_grad_(False), mesh["cfg"])
    parallelize(model, mesh)
    return difference(steps(model), expected)


def told_of_shards(mesh: DeviceMesh, model: Model) -> str:
    parallelize(model, mesh)
    try:
        model(torch.ones(1, 7, CHANNELS))
    except ValueError as raised:
        return str(raised)
    return "nothing"


def other_shards(mesh: DeviceMesh) -> str:
    """On rank 1 alone, weights are sharded along another dim."""
    dim = torch.distributed.get_rank()
    placed = {"shard_placement_fn": lambda weight: Shard(dim % weight.ndim)}
    return told_of_shards(mesh, sharded(Model().requires_grad_(False), mesh["cp"], root=False, **placed))


def another_value_in_a_shard(mesh: DeviceMesh) -> str:
    """On rank 1 alone; both ranks of `cfg` hold the same shard, as HSDP does it."""
    model = sharded(Model().requires_grad_(False), mesh, root=False)
    if torch.distributed.get_rank() == 1:
        model.blocks[1].attn_out.weight.to_local()[3, 3] += 1
    return told_of_shards(mesh, model)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_on_every_rank(on_this_rank, 2, tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("dim", ["cp", "cfg"])
@pytest.mark.parametrize("name", KINDS)
def test_weights_of_this_kind_are_those_of_one_device_and_of_all_ranks(name, dim, of_ranks):
    if not KINDS[name].is_installed:
        pytest.skip(f"needs {KINDS[name].needs}")
    for found in of_ranks:
        error, captured, told = found[name, dim]
        assert error <= 1e-5
        assert captured.startswith("Captured: " if KINDS[name].is_captured else "Not captured: ")
        assert "Model has other weights on rank 1 of this mesh than on rank 0 (blocks." in told


def test_a_tensor_that_is_replaced_inside_of_a_weight_is_seen(of_ranks):
    for found in of_ranks:
        error, told = found["replaced inside"]
        assert error <= 1e-5
        assert told.startswith("Captured: ")


def test_inference_mode_is_no_reason_to_run_on_whole_tensors(of_ranks):
    for found in of_ranks:
        error, replicated = found["in inference mode"]
        assert error <= 1e-5
        assert not replicated


def test_shards_of_weights_are_gathered_as_ever_and_their_gradients_divided(of_ranks):
    for found in of_ranks:
        output, gradients = found["gradients of shards"]
        assert output <= 1e-5
        assert gradients <= 1e-4
        assert found["guided on shards"] <= 1e-5


def test_ranks_that_hold_other_shards_are_told(of_ranks):
    for found in of_ranks:
        assert "other weights on rank 1 of this mesh than on rank 0 (blocks.0.to_qkv.weight)" in found["other shards"]
        told = found["another value in a shard"]
        assert "other weights on rank 1 of this mesh than on rank 0 (blocks.1.attn_out.weight)" in told


def on_this_rank() -> dict[Any, Any]:
    meshes = {"cp": init_mesh(Layout(cp=2), "cpu"), "cfg": init_mesh(Layout(cfg=2), "cpu")}
    found: dict[Any, Any] = {"gradients of shards": gradients_of_shards(meshes["cp"])}
    found["in inference mode"] = in_inference_mode(meshes["cp"])
    with torch.no_grad():
        found["replaced inside"] = replaced_inside(meshes["cp"])
        found["guided on shards"] = guided_on_shards(meshes["cfg"])
        found["other shards"] = other_shards(meshes["cp"])
        found["another value in a shard"] = another_value_in_a_shard(meshes["cfg"])
        return found | of_kinds(meshes)


def of_kinds(meshes: dict[str, DeviceMesh]) -> dict[Any, Any]:
    return {
        (name, dim): on_mesh(name, mesh)
        for name, kind in KINDS.items()
        for dim, mesh in meshes.items()
        if kind.is_installed
    }
