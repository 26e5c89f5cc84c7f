"""The all-to-all between a shard of the sequence and a shard of the heads.

`DTensor.redistribute` does the same, but on a CPU mesh it gathers the whole
tensor on every rank and throws most of it away, and it sends query, key and
value one after the other. This is the one place where the transition happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from meshdiff.attention.local import from_shard
from meshdiff.placements import SEQUENCE
from meshdiff.simulation import on_each_rank

__all__ = ["chunk_sizes", "exchange"]


def chunk_sizes(length: int, chunks: int) -> list[int]:
    """How DTensor divides `length` between ranks: ceil-sized parts, the last ones short or empty.

    >>> chunk_sizes(61, 4)
    [16, 16, 16, 13]
    """
    size = -(-length // chunks)
    return [max(0, min(size, length - i * size)) for i in range(chunks)]


def exchange(tensors: Sequence[DTensor], source: Shard, target: Shard) -> list[DTensor]:
    """Move tensors of one shape from one shard dim to another, in a single all-to-all.

    Differentiable. Any lengths: where ranks do not divide a dim, each holds
    DTensor's own uneven chunk and nothing is padded.

    Args:
        tensors: DTensors `[batch, seq, heads, head_dim]` of the same shape and
            dtype, all placed `[source]` on the same 1-D mesh.
        source, target: `SEQUENCE` and `HEADS`, or the reverse.

    Returns:
        The tensors placed `[target]`.
    """
    return list(_Exchange.apply(source, target, *tensors))


class _Exchange(torch.autograd.Function):
    """The exchange; its gradient is the exchange back."""

    @staticmethod
    def forward(ctx: Any, source: Shard, target: Shard, *tensors: DTensor) -> tuple[DTensor, ...]:
        ctx.source, ctx.target = source, target
        first = tensors[0]
        shards: Sequence[Tensor] = [tensor.to_local() for tensor in tensors]
        if first.device_mesh.size() > 1:
            shards = _exchange_shards(first.device_mesh, first.shape, source, target, shards)
        return tuple(from_shard(shard, first.device_mesh, target, first.shape, first.stride()) for shard in shards)

    @staticmethod
    def backward(ctx: Any, *gradients: DTensor) -> tuple[Any, ...]:
        placed = [gradient.redistribute(placements=[ctx.target]) for gradient in gradients]
        return None, None, *_Exchange.apply(ctx.target, ctx.source, *placed)


def _exchange_shards(
    mesh: DeviceMesh, shape: torch.Size, source: Shard, target: Shard, shards: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    rank, ranks = mesh.get_local_rank(), mesh.size()
    kept, given = chunk_sizes(shape[source.dim], ranks), chunk_sizes(shape[target.dim], ranks)
    # Elements that cross for each pair of an index of the source dim and one of the target dim.
    unit = len(shards) * shape[0] * shape[3]

    buffer = _pack(given, target.dim, *shards)
    received = funcol.all_to_all_single(
        buffer,
        output_split_sizes=_message_sizes(unit, given, kept, rank),
        input_split_sizes=_message_sizes(unit, kept, given, rank),
        group=mesh,
    )
    received = funcol.wait_tensor(received)
    unpack = _unpack_sequence if source == SEQUENCE else _unpack_heads
    return unpack(received, rank, tuple(kept), tuple(given), len(shards), shape[0], shape[3])


@on_each_rank
def _message_sizes(unit: int, own: list[int], others: list[int], rank: int) -> list[int]:
    """Elements of the message between this rank, by its size of one dim, and each other, by theirs of the other."""
    return [unit * own[rank] * size for size in others]


# A message is laid out [seq, batch, tensor, heads, head_dim]. With the sequence
# outermost, what arrives from all ranks is in order already when the sequence is
# what was divided: the tensors are views of the receive buffer, for every batch
# size and every uneven length.


@on_each_rank
def _pack(given: list[int], dim: int, *shards: Tensor) -> Tensor:
    """One message for each rank, one after the other, with a single copy of each element."""
    batch, seq, heads, head_dim = shards[0].shape
    buffer = shards[0].new_empty(len(shards) * shards[0].numel())
    pieces = [shard.split(given, dim=dim) for shard in shards]  # [tensor][rank]
    sizes = [sum(tensor[r].numel() for tensor in pieces) for r in range(len(given))]
    for rank, message in enumerate(buffer.split(sizes)):
        seq_r, heads_r = (given[rank], heads) if dim == SEQUENCE.dim else (seq, given[rank])
        view = message.view(seq_r, batch, len(shards), heads_r, head_dim)
        for i, tensor in enumerate(pieces):
            view[:, :, i].copy_(tensor[rank].transpose(0, 1))
    return buffer


@on_each_rank
def _unpack_sequence(
    received: Tensor, rank: int, kept: tuple[int, ...], given: tuple[int, ...], count: int, batch: int, head_dim: int
) -> tuple[Tensor, ...]:
    """Views `[batch, seq, own heads, head_dim]` of parts that arrived in the order of the sequence."""
    stacked = received.view(sum(kept), batch, count, given[rank], head_dim)
    return tuple(stacked[:, :, i].transpose(0, 1) for i in range(count))


@on_each_rank
def _unpack_heads(
    received: Tensor, rank: int, kept: tuple[int, ...], given: tuple[int, ...], count: int, batch: int, head_dim: int
) -> tuple[Tensor, ...]:
    """`[batch, own seq, heads, head_dim]`, from parts that each hold some of the heads."""
    seq = given[rank]
    parts = received.split([count * batch * head_dim * seq * heads for heads in kept])
    views = [
        part.view(seq, batch, count, heads, head_dim).transpose(0, 1) for part, heads in zip(parts, kept, strict=True)
    ]  # one for each rank, [batch, own seq, tensor, its heads, head_dim]
    return tuple(torch.cat([view[:, :, i] for view in views], dim=2) for i in range(count))
