"""Checks of what mesh attention is given; each error says how to put it right."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from meshdiff.attention.problem import Problem, chunk_ranges, chunk_sizes
from meshdiff.attention.strategy import AUTO, STRATEGIES, choose_strategy
from meshdiff.distributed.caching import lru_cache_by_mesh
from meshdiff.distributed.fingerprint import fingerprint, sha256
from meshdiff.distributed.placements import REPLICATED, SEQUENCE
from meshdiff.distributed.simulation import is_simulated, rank_values

__all__ = ["CHECK", "check_ranks", "describe", "digest", "is_checked", "is_placed", "placement", "plain_mask", "read"]

CHECK = "MESHDIFF_CHECK"
"""The environment variable that makes every attention compare what its ranks hold."""

SHARDS = "shards"  # what a rank alone knows of itself

TRANSPOSE = "if they are [batch, heads, seq, head_dim], pass each with .transpose(1, 2)"


def read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    strategy: str = AUTO,
) -> Problem | None:
    """The problem that DTensors pose by their shapes and placements; None for plain tensors.

    Raises:
        ValueError: if they pose none, or one that `strategy` cannot solve.
    """
    if strategy not in (AUTO, *STRATEGIES):
        raise ValueError(f"strategy={strategy!r} given; use {', '.join(map(repr, (AUTO, *STRATEGIES)))}")
    tensors = (query, key, value)

    def wrong(expected: str, fix: str = "") -> ValueError:
        given = describe(query=query, key=key, value=value)
        return ValueError(f"attention takes {expected}; given {given}{'; ' if fix else ''}{fix}")

    if any(tensor.ndim != 4 for tensor in tensors):
        raise wrong("[batch, seq, heads, head_dim]")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise wrong("key and value of one shape, with the batch of query")
    if query.shape[3] != key.shape[3] or key.shape[3] != value.shape[3]:
        raise wrong("query, key and value of one head_dim")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise wrong("heads of key and value that divide those of query", TRANSPOSE)
    if not query.dtype == key.dtype == value.dtype:
        raise wrong("query, key and value of one dtype", f"pass each with .to({query.dtype})")
    if not query.dtype.is_floating_point:
        raise wrong("floating point tensors")
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return None
    if not (isinstance(query, DTensor) and isinstance(key, DTensor) and isinstance(value, DTensor)):
        raise wrong(
            "plain tensors or DTensors, not both",
            "meshdiff.place(tensor, mesh, [Shard(1)]) makes a DTensor of a plain tensor that every rank holds whole",
        )
    if query.device_mesh.ndim != 1 or not query.device_mesh == key.device_mesh == value.device_mesh:
        raise wrong('DTensors on one 1-D mesh, mesh["cp"] say')
    keys_placed = any(all(is_placed(tensor, where) for tensor in (key, value)) for where in (SEQUENCE, REPLICATED))
    if not is_placed(query, SEQUENCE) or not keys_placed:
        raise wrong(
            "[batch, seq, heads, head_dim] with query Shard(1), and key and value both Shard(1) or both Replicate()",
            f"use .redistribute(placements=[Shard(1)]), or, {TRANSPOSE}",
        )
    mesh = query.device_mesh
    problem = _problem(mesh, query.shape, key.shape[1], key.shape[2], query.dtype, is_causal, scale)
    if placement(key) == SEQUENCE:
        choose_strategy(problem, strategy)
    return problem


@lru_cache_by_mesh
def _problem(
    mesh: DeviceMesh,
    query: torch.Size,
    keys: int,
    kv_heads: int,
    dtype: torch.dtype,
    is_causal: bool,
    scale: float | None,
) -> Problem:
    return Problem(
        mesh=mesh,
        batch=query[0],
        heads=query[2],
        kv_heads=kv_heads,
        head_dim=query[3],
        dtype=dtype,
        queries=tuple((own,) for own in chunk_ranges(query[1], mesh.size())),
        keys=tuple((own,) for own in chunk_ranges(keys, mesh.size())),
        is_causal=is_causal,
        scale=scale,
    )


def placement(tensor: Tensor) -> Placement | None:
    """Of a DTensor on a 1-D mesh; None for a plain tensor."""
    return tensor.placements[0] if isinstance(tensor, DTensor) else None


def is_placed(tensor: Tensor, where: Placement) -> bool:
    """True if a DTensor on a 1-D mesh is placed so, `SEQUENCE` or `REPLICATED`.

    On a mesh of one rank these are the same, and torch 2.11 makes one of the other.
    """
    found = placement(tensor)
    alone = isinstance(tensor, DTensor) and tensor.device_mesh.size() == 1
    return found == where or (found in (SEQUENCE, REPLICATED) and alone)


def plain_mask(mask: Tensor) -> Tensor:
    """The full mask that every rank holds, from a plain tensor or a replicated DTensor."""
    if mask.requires_grad:
        raise ValueError("attn_mask gets no gradient over a mesh; pass attn_mask.detach()")
    if not isinstance(mask, DTensor):
        return mask
    if any(p != REPLICATED for p in mask.placements):
        raise ValueError(
            f"attn_mask is to be whole on every rank; given {describe(attn_mask=mask)}; "
            "use .redistribute(placements=[Replicate()])"
        )
    return mask.to_local()


def describe(**tensors: Tensor) -> str:
    """Shapes, placements and meshes in words, for an error."""
    return ", ".join(f"{name} {_describe(tensor)}" for name, tensor in tensors.items())


def _describe(tensor: Tensor) -> str:
    kind = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if isinstance(tensor, DTensor):
        return f"{kind} {list(tensor.placements)} on mesh {tensor.device_mesh.mesh_dim_names}"
    return f"{kind} plain"


def is_checked() -> bool:
    """True if ranks are to compare what they were given, whatever that costs."""
    return os.environ.get(CHECK, "0") not in ("", "0")


def check_ranks(tensors: dict[str, Tensor | None], **settings: Any) -> None:
    """With `MESHDIFF_CHECK=1`, compare what ranks were given and raise on all of them where it does not fit.

    Checked before anything else: that every rank has the same shapes, dtypes,
    placements and settings, holds the shard that its placement says, and has
    equal values of what is to be equal. Costs one exchange of small objects and
    a pass over replicated values; nothing when off. Compiled code is not checked.

    Raises:
        ValueError: naming the tensor, the rank and the difference.
    """
    if not is_checked() or torch.compiler.is_compiling():
        return
    meshes = [tensor.device_mesh for tensor in tensors.values() if isinstance(tensor, DTensor)]
    if not meshes or meshes[0].ndim != 1:
        return
    facts = _facts(meshes[0], {name: tensor for name, tensor in tensors.items() if tensor is not None}, settings)
    for rank, held in enumerate(facts):
        for name in {**facts[0], **held}:
            if name != SHARDS and facts[0].get(name) != held.get(name):
                raise ValueError(
                    f"{CHECK}: {name} differs between ranks of mesh {meshes[0].mesh_dim_names}: "
                    f"rank 0 has {facts[0].get(name)}, rank {rank} has {held.get(name)}"
                )
        for name, (expected, found) in held[SHARDS].items():
            if expected != found:
                raise ValueError(
                    f"{CHECK}: {name} is to be {expected} on rank {rank}, which holds {found}; "
                    "DTensor.from_local of uneven shards needs the whole tensor's shape= and stride="
                )


def _facts(mesh: DeviceMesh, tensors: dict[str, Tensor], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each rank of the mesh, in its order."""
    values = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}

    def fact(rank: int, own: dict[str, Tensor]) -> dict[str, Any]:
        facts = {**settings, SHARDS: {}}
        for name, tensor in tensors.items():
            facts[name] = _describe(tensor)
            if placement(tensor) == SEQUENCE:
                shape = list(tensor.shape)
                shape[1] = chunk_sizes(shape[1], mesh.size())[rank]
                facts[SHARDS][name] = shape, list(own[name].shape)
            elif placement(tensor) in (None, REPLICATED):
                facts[f"the value of {name}"] = digest(own[name])
        return facts

    if not is_simulated():
        return _gather_objects(mesh, fact(mesh.get_local_rank(), values))
    by_rank = {name: _by_rank(mesh, value) for name, value in values.items()}
    return [fact(rank, {name: v[rank] for name, v in by_rank.items()}) for rank in range(mesh.size())]


def _by_rank(mesh: DeviceMesh, tensor: Tensor) -> list[Tensor]:
    values = rank_values(tensor)
    return [values[rank] for rank in mesh.mesh.tolist()] if len(values) > 1 else values * mesh.size()


def _gather_objects(mesh: DeviceMesh, own: Any) -> list[Any]:
    everyone: list[Any] = [None] * mesh.size()
    dist.all_gather_object(everyone, own, group=mesh.get_group())
    return everyone


def digest(tensor: Tensor) -> str:
    """A short name for the values, to the bit, of a tensor of any class; see `meshdiff.distributed.fingerprint`."""
    entries = fingerprint(tensor, sha256)
    if len(entries) == 1:
        return str(entries[0].value[-1])
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:12]
