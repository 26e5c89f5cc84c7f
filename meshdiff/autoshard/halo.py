"""Rows that other ranks hold: a rank may need them to compute its own rows of a result.

A convolution needs a few rows beyond those of its rank, the halo; so do pooling, padding by reflection, and a reshape
of a dim that the ranks do not divide. Each says which rows a rank needs, and one exchange brings them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from meshdiff.attention.problem import chunk_ranges
from meshdiff.attention.seq_head_exchange import all_to_all
from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import sharded_dim
from meshdiff.distributed.local_shards import contiguous_stride, place_on, to_shard, wrap
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["Halo", "Picked", "Rows", "Window", "by_window", "with_halo"]


@dataclass(frozen=True)
class Window:
    """The rows of an input that rows of a result are made of.

    Rows `a` to `b` of the result are made of rows `(a * step + first) // parts` up to and with
    `((b - 1) * step + last) // parts` of the input.
    """

    step: int = 1
    parts: int = 1
    first: int = 0
    last: int = 0

    def __call__(self, rows: range) -> range:
        return range(
            (rows.start * self.step + self.first) // self.parts,
            ((rows.stop - 1) * self.step + self.last) // self.parts + 1,
        )


@dataclass(frozen=True)
class Picked:
    """The same where each row of the result is one row of the input: `rows` has their numbers."""

    rows: tuple[int, ...]

    def __call__(self, rows: range) -> range:
        picked = self.rows[rows.start : rows.stop]
        return range(min(picked), max(picked) + 1)


Rows = tuple[range, ...]
"""Rows of a dim, by their numbers, in the order in which a rank has them."""


@dataclass(frozen=True)
class Halo:
    """The rows that each rank holds of a tensor, and those that it needs.

    Attributes:
        held: of each rank; each of `length` rows is held by one.
        wanted: of each rank; rows below 0, and from `length` on, are zeros.
        length: number of rows.
    """

    held: tuple[Rows, ...]
    wanted: tuple[Rows, ...]
    length: int

    def moves(self) -> bool:
        """True if any rank needs a row of another."""
        return _moves(self)

    def stays(self, rank: int) -> bool:
        """True if this rank has all rows that it needs, one after the other."""
        wanted = self.wanted[rank]
        return len(wanted) < 2 and sum(piece.rows for piece in _pieces(self, rank, rank)[:1]) == sum(map(len, wanted))


class Piece(NamedTuple):
    """Rows that travel together: where they are among the sender's, where they go among the receiver's."""

    start: int
    place: int
    rows: int


@lru_cache(maxsize=4096)
def _pieces(halo: Halo, sender: int, receiver: int) -> tuple[Piece, ...]:
    """The rows of the sender that the receiver needs, in the receiver's order."""
    found, place = [], 0
    for wanted in halo.wanted[receiver]:
        start = 0
        for held in halo.held[sender]:
            first, last = max(held.start, wanted.start), min(held.stop, wanted.stop)
            if first < last:
                found.append(Piece(start + first - held.start, place + first - wanted.start, last - first))
            start += len(held)
        place += len(wanted)
    return tuple(found)


@lru_cache(maxsize=4096)
def _moves(halo: Halo) -> bool:
    ranks = range(len(halo.held))
    return any(_pieces(halo, sender, receiver) for sender in ranks for receiver in ranks if sender != receiver)


@lru_cache(maxsize=4096)
def _halo(length: int, made: int, ranks: int, window: Window | Picked) -> Halo:
    """The halo of a tensor of `length` rows, of which ranks make their parts of `made` rows."""
    wanted = tuple((window(own),) if own else () for own in chunk_ranges(made, ranks))
    return Halo(tuple((own,) for own in chunk_ranges(length, ranks)), wanted, length)


def by_window(
    ctx: ShardingContext,
    tensor: DTensor,
    shape: torch.Size,
    window: Window | Picked,
    func: Callable[..., Tensor],
    *args: Any,
) -> DTensor:
    """Run a function whose rows are made of rows near them, of which other ranks hold some; not differentiable.

    Args:
        ctx: that of the handler that calls this.
        tensor: the operand that is sharded, along a dim that the result has at the same place.
        shape: of the full result.
        window: the rows that rows of the result are made of.
        func: takes these rows, of which some may be zeros beyond the ends of the tensor, the range of the rows to
            make, the number of the first row given, and `args`; returns the rows.
        args: plain tensors that are the same on every rank, and other values.

    Returns:
        A contiguous DTensor that is sharded along the same dim as `tensor`.
    """
    dim = sharded_dim(tensor)
    assert dim is not None
    ctx.materialize(tensor)
    ranks, rank = place_on(ctx.mesh)
    halo = _halo(tensor.shape[dim], shape[dim], ranks, window)
    made = chunk_ranges(shape[dim], ranks)
    with ctx.unguarded():
        rows = with_halo(to_shard(tensor), halo, dim, ctx.mesh)
        local = _make(func, rank, made, halo, window, dim, rows, *args)
    return wrap(local, ctx.mesh, Shard(dim), shape, contiguous_stride(shape))


@on_each_rank
def _make(
    func: Callable[..., Tensor],
    rank: int,
    made: tuple[range, ...],
    halo: Halo,
    window: Callable[[range], range],
    dim: int,
    rows: Tensor,
    *args: Any,
) -> Tensor:
    if made[rank]:
        return func(rows, made[rank], halo.wanted[rank][0].start, *args).contiguous()
    # A row of zeros, for the shape and dtype of no rows.
    wanted = window(range(1))
    zeros = rows.new_zeros((*rows.shape[:dim], len(wanted), *rows.shape[dim + 1 :]))
    return func(zeros, range(1), wanted.start, *args).narrow(dim, 0, 0).contiguous()


def with_halo(shard: Tensor, halo: Halo, dim: int, mesh: DeviceMesh) -> Tensor:
    """The rows that this rank needs, from its own and those of others, in one all-to-all or none; not differentiable.

    Args:
        shard: the rows that this rank holds along `dim`.

    Returns:
        A tensor of as many rows as the rank needs: a view of `shard`, if it has them all.
    """
    _, rank = place_on(mesh)
    received = None
    if halo.moves():
        received = all_to_all(
            _packed(shard, halo, dim, rank),
            _sizes(shard, halo, dim, rank, receives=True),
            _sizes(shard, halo, dim, rank, receives=False),
            mesh,
        )
    return _joined(shard, halo, dim, rank, received)


@on_each_rank
def _sizes(shard: Tensor, halo: Halo, dim: int, rank: int, *, receives: bool) -> list[int]:
    """Elements that this rank gets from each rank, or sends to it; what it keeps is in no message."""
    row = math.prod(size for other, size in enumerate(shard.shape) if other != dim)
    pairs = [(other, rank) if receives else (rank, other) for other in range(len(halo.held))]
    return [0 if one == other else row * sum(piece.rows for piece in _pieces(halo, one, other)) for one, other in pairs]


@on_each_rank
def _packed(shard: Tensor, halo: Halo, dim: int, rank: int) -> Tensor:
    """All that this rank sends, by receiver."""
    rows = [
        shard.narrow(dim, piece.start, piece.rows).reshape(-1)
        for receiver in range(len(halo.held))
        if receiver != rank
        for piece in _pieces(halo, rank, receiver)
    ]
    return torch.cat(rows) if rows else shard.new_empty(0)


@on_each_rank
def _joined(shard: Tensor, halo: Halo, dim: int, rank: int, received: Tensor | None) -> Tensor:
    wanted = halo.wanted[rank]
    if halo.stays(rank):
        own = _pieces(halo, rank, rank)
        return shard.narrow(dim, own[0].start if own else 0, sum(map(len, wanted)))
    joined = shard.new_empty((*shard.shape[:dim], sum(map(len, wanted)), *shard.shape[dim + 1 :]))
    place = 0
    for rows in wanted:
        below = len(range(rows.start, min(0, rows.stop)))
        above = len(range(max(halo.length, rows.start), rows.stop))
        joined.narrow(dim, place, below).zero_()
        joined.narrow(dim, place + len(rows) - above, above).zero_()
        place += len(rows)
    at = 0
    for sender in range(len(halo.held)):
        for piece in _pieces(halo, sender, rank):
            there = joined.narrow(dim, piece.place, piece.rows)
            if sender == rank:
                there.copy_(shard.narrow(dim, piece.start, piece.rows))
            else:
                assert received is not None
                there.copy_(received.narrow(0, at, there.numel()).view(there.shape))
                at += there.numel()
    return joined
