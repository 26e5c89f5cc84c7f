"""Attention over a mesh: DTensors in, DTensors out, and nothing gathered on the way."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from meshdiff.attention.local import attend_locally, scaled_dot_product_attention
from meshdiff.attention.ulysses import ulysses
from meshdiff.placements import SEQUENCE, WHOLE

__all__ = ["mesh_attention"]


def mesh_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention of `[batch, seq, heads, head_dim]`, on one device or over a mesh.

    Plain tensors are attended to on this device. DTensors on a 1-D mesh of N
    ranks are attended to by their placements:

    - all three `Shard(1)`: self-attention over the whole sequence, two
      all-to-alls (`ulysses`).
    - query `Shard(1)`, key and value `Replicate()`: cross-attention, nothing sent.

    Returns:
        The shape and placement of `query`.

    Raises:
        ValueError: for other placements, other meshes, or DTensors mixed with
            plain tensors.
    """
    tensors = {"query": query, "key": key, "value": value}
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return scaled_dot_product_attention(query, key, value)
    given = ", ".join(f"{name} {_describe(tensor)}" for name, tensor in tensors.items())
    if not (isinstance(query, DTensor) and isinstance(key, DTensor) and isinstance(value, DTensor)):
        raise ValueError(f"mesh_attention takes plain tensors or DTensors, not both; given {given}")
    if query.device_mesh.ndim != 1 or not query.device_mesh == key.device_mesh == value.device_mesh:
        raise ValueError(f'mesh_attention takes DTensors on one 1-D mesh, mesh["cp"] say; given {given}')
    placements = [tensor.placements[0] for tensor in (query, key, value)]
    if placements == [SEQUENCE, SEQUENCE, SEQUENCE]:
        if not query.shape == key.shape == value.shape:
            raise ValueError(f"self-attention needs query, key and value of one shape; given {given}")
        return ulysses(query, key, value)
    if placements == [SEQUENCE, WHOLE, WHOLE]:
        return attend_locally(query, key, value)
    raise ValueError(
        "mesh_attention takes [batch, seq, heads, head_dim] with query Shard(1) and key and value both Shard(1) or "
        f"both Replicate(); given {given}; use .redistribute(placements=[...]) to place them so"
    )


def _describe(tensor: Tensor) -> str:
    shape = list(tensor.shape)
    if isinstance(tensor, DTensor):
        names = tensor.device_mesh.mesh_dim_names
        return f"{shape} {list(tensor.placements)} on mesh {names}"
    return f"{shape} plain"
