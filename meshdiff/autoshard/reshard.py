"""Cutting and joining along the sharded dim: an exchange of the rows whose owner changes.

On one device `cat`, a slice, `split` and padding lay rows out anew. On shards
the rows that a rank holds before and after mostly are the same ones; DTensor
would gather all of them, this sends only those that a rank misses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from meshdiff.attention.problem import chunk_ranges
from meshdiff.attention.seq_head_exchange import all_to_all
from meshdiff.distributed.local_shards import contiguous_stride, place_on, wrap
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["SourceSlice", "exchange_into", "nothing_moves", "plan_of", "reshard", "unfilled"]


@dataclass(frozen=True)
class SourceSlice:
    """Rows `start` to `stop` of a source; zeros if the source is None."""

    source: int | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """The rows that each output takes from each source.

    Attributes:
        sources: the length of each source.
        sharded: True for a source that is sharded; else every rank holds all of it.
        outputs: the pieces that each output is made of, in order.
        ranks: number of ranks that share the rows of each.
    """

    sources: tuple[int, ...]
    sharded: tuple[bool, ...]
    outputs: tuple[tuple[SourceSlice, ...], ...]
    ranks: int

    def length(self, output: int) -> int:
        return sum(map(len, self.outputs[output]))


@dataclass(frozen=True)
class Segment:
    """Rows that travel together: where they are in the sender's part, and where they go in the receiver's."""

    source: int
    start: int
    output: int
    place: int
    rows: int


@lru_cache(maxsize=4096)
def segments(plan: Plan, sender: int, receiver: int) -> tuple[Segment, ...]:
    """Rows of the sender that the receiver needs; of a replicated source, each rank has what it needs."""
    found = []
    for output, pieces in enumerate(plan.outputs):
        wanted = chunk_ranges(plan.length(output), plan.ranks)[receiver]
        at = 0
        for piece in pieces:
            first, at = at, at + len(piece)
            if piece.source is None:
                continue
            held = range(plan.sources[piece.source])
            if plan.sharded[piece.source]:
                held = chunk_ranges(plan.sources[piece.source], plan.ranks)[sender]
            elif sender != receiver:
                continue
            shift = first - piece.start  # from rows of the source to rows of the output
            start = max(piece.start, held.start, wanted.start - shift)
            stop = min(piece.stop, held.stop, wanted.stop - shift)
            if start < stop:
                place = start + shift - wanted.start
                found.append(Segment(piece.source, start - held.start, output, place, stop - start))
    return tuple(found)


@lru_cache(maxsize=4096)
def nothing_moves(plan: Plan) -> bool:
    """True if every rank has all rows that it needs."""
    return not any(segments(plan, *pair) for pair in itertools.permutations(range(plan.ranks), 2))


def plan_of(sources: Sequence[DTensor], outputs: Sequence[Sequence[SourceSlice]], dim: int) -> Plan:
    return Plan(
        tuple(source.shape[dim] for source in sources),
        tuple(source.placements[0].is_shard() for source in sources),
        tuple(map(tuple, outputs)),
        sources[0].device_mesh.size(),
    )


def reshard(
    sources: Sequence[DTensor], outputs: Sequence[Sequence[SourceSlice]], dim: int, views: bool = False
) -> list[DTensor]:
    """New DTensors, sharded on `dim`, made of pieces of others along that dim; one all-to-all, or none.

    Differentiable.

    Args:
        sources: on one 1-D mesh, each sharded on `dim` or replicated, alike in all other dims.
        outputs: what each output is made of, in order.
        dim: not negative.
        views: True if, on one device, the outputs would be views of the first source, and so have its strides.
    """
    return list(_Rearrange.apply(dim, tuple(map(tuple, outputs)), views, *sources))


class _Rearrange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dim: int, outputs: tuple[tuple[SourceSlice, ...], ...], views: bool, *sources: DTensor
    ) -> tuple[DTensor, ...]:
        ctx.dim, ctx.outputs = dim, outputs
        ctx.lengths = [source.shape[dim] for source in sources]
        ctx.set_materialize_grads(False)  # torch would make plain zeros
        return tuple(_resharded(sources, outputs, dim, sources[0].stride() if views else None))

    @staticmethod
    def backward(ctx: Any, *gradients: DTensor | None) -> tuple[Any, ...]:
        given = [i for i, gradient in enumerate(gradients) if gradient is not None]
        of_sources = [_back(ctx.outputs, given, source, length) for source, length in enumerate(ctx.lengths)]
        sharded = [_on_dim(gradient, ctx.dim) for gradient in gradients if gradient is not None]
        return None, None, None, *_resharded(sharded, of_sources, ctx.dim)


def _back(outputs: Sequence[Sequence[SourceSlice]], given: list[int], source: int, length: int) -> list[SourceSlice]:
    """The gradient of a source: pieces of those that the outputs were given, and zeros elsewhere."""
    taken = []
    for place, output in enumerate(given):
        at = 0
        for piece in outputs[output]:
            if piece.source == source:
                taken.append((piece.start, SourceSlice(place, at, at + len(piece))))
            at += len(piece)
    whole, at = [], 0
    for start, piece in sorted(taken, key=lambda pair: pair[0]):
        whole += [SourceSlice(None, at, start), piece]
        at = start + len(piece)
    return [piece for piece in [*whole, SourceSlice(None, at, length)] if len(piece)]


def _on_dim(tensor: DTensor, dim: int) -> DTensor:
    placement = tensor.placements[0]
    if placement.is_replicate() or placement.is_shard(dim):
        return tensor
    return tensor.redistribute(placements=[Shard(dim)])


def _resharded(
    sources: Sequence[DTensor],
    outputs: Sequence[Sequence[SourceSlice]],
    dim: int,
    stride: tuple[int, ...] | None = None,
) -> list[DTensor]:
    zeros = [any(piece.source is None for piece in pieces) for pieces in outputs]
    lengths = [sum(map(len, pieces)) for pieces in outputs]
    made = [unfilled(sources[0], *own, dim, stride) for own in zip(lengths, zeros, strict=True)]
    exchange_into(sources, outputs, dim, made)
    return made


def unfilled(like: DTensor, length: int, zeros: bool, dim: int, stride: tuple[int, ...] | None) -> DTensor:
    """A DTensor of as many rows, whose values are whatever was there, or zeros."""
    mesh = like.device_mesh
    shard = _memory(like.to_local(), zeros, length, *place_on(mesh), dim)
    shape = torch.Size((*like.shape[:dim], length, *like.shape[dim + 1 :]))
    return wrap(shard, mesh, Shard(dim), shape, stride or contiguous_stride(shape))


@on_each_rank
def _memory(like: Tensor, zeros: bool, length: int, ranks: int, rank: int, dim: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = len(chunk_ranges(length, ranks)[rank])
    return like.new_zeros(shape) if zeros else like.new_empty(shape)


def exchange_into(
    sources: Sequence[DTensor], outputs: Sequence[Sequence[SourceSlice]], dim: int, into: Sequence[DTensor]
) -> None:
    """Fill DTensors with their pieces of others; see `reshard`. Not differentiable."""
    mesh, plan = sources[0].device_mesh, plan_of(sources, outputs, dim)
    _, rank = place_on(mesh)
    shards = [source.to_local() for source in sources]
    row = math.prod(size for other, size in enumerate(sources[0].shape) if other != dim)
    received = None
    if not nothing_moves(plan):
        received = all_to_all(
            _pack(plan, rank, dim, *shards),
            _sizes(plan, rank, row, receives=True),
            _sizes(plan, rank, row, receives=False),
            mesh,
        )
    _unpack(plan, rank, dim, received, len(shards), *shards, *(output.to_local() for output in into))


@on_each_rank
def _sizes(plan: Plan, rank: int, row: int, *, receives: bool) -> list[int]:
    """Elements that this rank sends to each rank, or gets from it; what it keeps is in no message."""
    pairs = [(other, rank) if receives else (rank, other) for other in range(plan.ranks)]
    return [0 if one == other else row * sum(s.rows for s in segments(plan, one, other)) for one, other in pairs]


@on_each_rank
def _pack(plan: Plan, rank: int, dim: int, *shards: Tensor) -> Tensor:
    """All that this rank sends, by receiver."""
    rows = [
        shards[s.source].narrow(dim, s.start, s.rows).reshape(-1)
        for other in range(plan.ranks)
        if other != rank
        for s in segments(plan, rank, other)
    ]
    return torch.cat(rows) if rows else shards[0].new_empty(0)


@on_each_rank
def _unpack(plan: Plan, rank: int, dim: int, received: Tensor | None, sources: int, *tensors: Tensor) -> None:
    """Each output's part on this rank, of what it keeps and what has come; sources first, then outputs."""
    shards, made = tensors[:sources], tensors[sources:]
    at = 0
    for sender in range(plan.ranks):
        for s in segments(plan, sender, rank):
            place = made[s.output].narrow(dim, s.place, s.rows)
            if sender == rank:
                place.copy_(shards[s.source].narrow(dim, s.start, s.rows))
            else:
                assert received is not None
                place.copy_(received[at : at + place.numel()].view(place.shape))
                at += place.numel()
