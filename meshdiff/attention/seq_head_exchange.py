"""The all-to-all between a shard of the sequence and a shard of the heads.

`DTensor.redistribute` does the same, but on a CPU mesh it gathers the full
tensor on every rank and throws most of it away, and it sends query, key and
value one after the other. This is the one place where the transition happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.problem import Tokens
from meshdiff.distributed.caching import lru_cache_by_mesh
from meshdiff.distributed.local_shards import place_on
from meshdiff.distributed.simulation import on_each_rank
from meshdiff.distributed.torch_compat import funcol

__all__ = ["Exchange", "all_to_all", "heads_to_sequence", "sequence_to_heads"]


def all_to_all(buffer: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], mesh: DeviceMesh) -> Tensor:
    """Elements that the ranks of a 1-D mesh sent to this one, one after the other; not differentiable.

    It calls the operations that torch's functional collectives are made of. The
    code around them there, for graphs that are compiled, takes four times as long.

    Args:
        buffer: 1-D, what this rank sends to each, one after the other.
        output_sizes, input_sizes: elements for this rank from each, and from it to each.
    """
    if torch.compiler.is_compiling():
        received = funcol.all_to_all_single(buffer, list(output_sizes), list(input_sizes), mesh)
        return funcol.wait_tensor(received)
    ops, name = torch.ops._c10d_functional, _group_name(mesh)
    received = ops.all_to_all_single.default(buffer, list(output_sizes), list(input_sizes), name)
    return ops.wait_tensor.default(received)


@lru_cache_by_mesh
def _group_name(mesh: DeviceMesh) -> str:
    return mesh.get_group().group_name


@dataclass(frozen=True)
class Exchange:
    """Numbers of tokens that ranks hold before, and heads that they hold after, of tensors that are sent together.

    Attributes:
        mesh: the ranks that exchange, on a 1-D mesh.
        tokens: the tokens of each of those ranks; one such list for each group,
            where a larger mesh is made of several groups that exchange apart.
        heads: for each tensor, the heads of each rank. Ranges may overlap: a
            head of key and value that several ranks need goes to each of them.
        group: the index of this rank's list.
        order: where the tokens of each rank are among all, if not those of one rank after those of another.
        of_queries: True if the first tensor is a query; this decides its layout in memory, never its values.
    """

    mesh: DeviceMesh
    tokens: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[range, ...], ...]
    group: int = 0
    order: tuple[Tokens, ...] | None = None
    of_queries: bool = True

    def places(self, group: int) -> tuple[Tokens, ...]:
        """The positions of the tokens of each rank of a group, among all tokens of the group."""
        tokens = self.tokens[group]
        return self.order or tuple((range(end - n, end),) for end, n in zip(accumulate(tokens), tokens, strict=True))


def sequence_to_heads(exchange: Exchange, *shards: Tensor) -> tuple[Tensor, ...]:
    """All tokens of this rank's heads, from its own tokens of all heads, in a single all-to-all.

    Differentiable. Any lengths and head counts; nothing is padded.

    Args:
        shards: this rank's `[batch, own seq, heads, head_dim]` of each tensor.

    Returns:
        `[batch, seq, own heads, head_dim]` of each tensor, the tokens in the order of ranks or as `order` says.
    """
    return _SequenceToHeads.apply(exchange, *shards)


def heads_to_sequence(exchange: Exchange, *shards: Tensor) -> tuple[Tensor, ...]:
    """The way back: `[batch, own seq, heads, head_dim]` from `[batch, seq, own heads, head_dim]`.

    Where several ranks hold a head, the sum of theirs, which makes it the
    gradient of `sequence_to_heads`.
    """
    return _HeadsToSequence.apply(exchange, *shards)


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        mesh, group, (_, rank) = exchange.mesh, exchange.group, place_on(exchange.mesh)
        unit = shards[0].shape[0] * shards[0].shape[3]
        received = all_to_all(
            _pack_tokens(exchange, rank, *shards),
            _sizes(exchange, unit, group, rank, by_tokens=True, own=False),
            _sizes(exchange, unit, group, rank, by_tokens=False, own=False),
            mesh,
        )
        return _unpack_tokens(received, exchange, group, rank, *shards)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_HeadsToSequence.apply(ctx.exchange, *gradients)


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        mesh, group, (_, rank) = exchange.mesh, exchange.group, place_on(exchange.mesh)
        batch, _, _, head_dim = shards[0].shape
        received = all_to_all(
            _pack_heads(exchange, group, *shards),
            _sizes(exchange, batch * head_dim, group, rank, by_tokens=False),
            _sizes(exchange, batch * head_dim, group, rank, by_tokens=True),
            mesh,
        )
        return _unpack_heads(received, exchange, group, rank, batch, head_dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_SequenceToHeads.apply(ctx.exchange, *gradients)


@on_each_rank
def _sizes(exchange: Exchange, unit: int, group: int, rank: int, *, by_tokens: bool, own: bool = True) -> list[int]:
    """Elements that this rank and each other have in common: own heads of their tokens, or the reverse."""
    tokens = exchange.tokens[group]
    heads = [sum(len(ranges[r]) for ranges in exchange.heads) for r in range(len(tokens))]
    sizes = [unit * (heads[rank] * tokens[r] if by_tokens else tokens[rank] * heads[r]) for r in range(len(tokens))]
    return sizes if own else [size if r != rank else 0 for r, size in enumerate(sizes)]


# From tokens to heads, a message holds [batch, heads, seq, head_dim] of one tensor after the other,
# and what a rank keeps is in no message: each element is copied once into its message and once into
# a tensor laid out as kernels read it fastest, or only once, into the latter. A query is laid out as
# kernels are to lay out their output, which is as they are given it. Sending less through the buffers
# than "everything, to everyone" halves the time of an exchange between two ranks.
#
# Neighbouring ranks whose parts are alike share a copy. Where all are, eight ranks take no more of them
# than three: one for those before this rank, one for itself, one for those after it.


def _stretches(parts: Sequence[Sequence[range]], alone: int | None = None) -> list[range]:
    """Ranks one after the other, each of whose parts go on where those of the one before end, with the same lengths.

    Args:
        parts: of each rank.
        alone: a rank that is to share with none.
    """
    found = [range(1)]
    for rank, (before, own) in enumerate(pairwise(parts), start=1):
        alike = len(before) == len(own) and all(
            one.stop == other.start and len(one) == len(other) for one, other in zip(before, own, strict=True)
        )
        if alike and alone not in (rank - 1, rank):
            found[-1] = range(found[-1].start, rank + 1)
        else:
            found.append(range(rank, rank + 1))
    return found


def _by_rank(exchange: Exchange) -> list[tuple[range, ...]]:
    """The heads that each rank has of each tensor."""
    return list(zip(*exchange.heads, strict=True))


@on_each_rank
def _pack_tokens(exchange: Exchange, rank: int, *shards: Tensor) -> Tensor:
    """Own tokens, for each other rank those of its heads."""
    heads, (batch, seq, _, head_dim) = _by_rank(exchange), shards[0].shape
    unit, at = batch * seq * head_dim, 0
    buffer = shards[0].new_empty(unit * sum(len(own) for r, ranges in enumerate(heads) for own in ranges if r != rank))
    for others in _stretches(heads, alone=rank):
        if rank in others:
            continue
        widths = [len(own) for own in heads[others.start]]
        messages = buffer.narrow(0, at, len(others) * unit * sum(widths)).view(len(others), unit * sum(widths))
        at += messages.numel()
        for message, first, shard in zip(
            messages.split([unit * width for width in widths], dim=1), heads[others.start], shards, strict=True
        ):
            sent = shard.narrow(2, first.start, len(others) * len(first))
            message.view(len(others), batch, len(first), seq, head_dim).copy_(
                sent.view(batch, seq, len(others), len(first), head_dim).permute(2, 0, 3, 1, 4)
            )
    return buffer


@on_each_rank
def _unpack_tokens(received: Tensor, exchange: Exchange, group: int, rank: int, *shards: Tensor) -> tuple[Tensor, ...]:
    """`[batch, seq, own heads, head_dim]`, the tokens where they belong."""
    heads, places = _by_rank(exchange)[rank], exchange.places(group)
    (batch, _, _, head_dim), seq, at = shards[0].shape, sum(exchange.tokens[group]), 0
    whole = [shard.new_empty(batch, len(own), seq, head_dim) for own, shard in zip(heads, shards, strict=True)]
    if exchange.of_queries:
        whole[0] = shards[0].new_empty(batch, seq, len(heads[0]), head_dim).transpose(1, 2)
    for others in _stretches(places, alone=rank):
        tokens = [len(place) for place in places[others.start]]
        sizes = [batch * len(own) * sum(tokens) * head_dim for own in heads]
        if rank in others:
            arrived = [
                shard.narrow(2, own.start, len(own)).transpose(1, 2).unsqueeze(0)
                for own, shard in zip(heads, shards, strict=True)
            ]
        else:
            messages = received.narrow(0, at, len(others) * sum(sizes)).view(len(others), sum(sizes))
            at += messages.numel()
            arrived = [
                message.view(len(others), batch, len(own), sum(tokens), head_dim)
                for message, own in zip(messages.split(sizes, dim=1), heads, strict=True)
            ]
        for tensor, rows in zip(whole, arrived, strict=True):
            for place, part in zip(places[others.start], rows.split(tokens, dim=3), strict=True):
                there = tensor.narrow(2, place.start, len(others) * len(place))
                there = there.view(batch, tensor.shape[1], len(others), len(place), head_dim)
                there.permute(2, 0, 1, 3, 4).copy_(part)
    return tuple(tensor.transpose(1, 2) for tensor in whole)


# From heads to tokens, a message holds [seq, batch, heads, head_dim], with the heads of all tensors
# side by side: for batch 1 what a kernel returns is the buffer to send.


@on_each_rank
def _pack_heads(exchange: Exchange, group: int, *shards: Tensor) -> Tensor:
    """Own heads of all tokens, those of one rank after those of another."""
    rows = [shard.transpose(0, 1) for shard in shards]
    if len(rows) > 1:
        rows = [torch.cat(rows, dim=2)]
    if exchange.order is None:
        return rows[0].contiguous().view(-1)
    (whole,), places, at = rows, exchange.places(group), 0
    buffer = whole.new_empty(whole.shape)
    for ranks in _stretches(places):
        tokens = [len(place) for place in places[ranks.start]]
        there = buffer.narrow(0, at, len(ranks) * sum(tokens)).view(len(ranks), sum(tokens), *whole.shape[1:])
        at += len(ranks) * sum(tokens)
        for place, part in zip(places[ranks.start], there.split(tokens, dim=1), strict=True):
            sent = whole.narrow(0, place.start, len(ranks) * len(place))
            part.copy_(sent.view(len(ranks), len(place), *whole.shape[1:]))
    return buffer.view(-1)


@on_each_rank
def _unpack_heads(
    received: Tensor, exchange: Exchange, group: int, rank: int, batch: int, head_dim: int
) -> tuple[Tensor, ...]:
    """`[batch, own seq, heads, head_dim]`, from parts that each hold some of the heads of each tensor."""
    heads, seq, at = _by_rank(exchange), exchange.tokens[group][rank], 0
    whole = [_unfilled(received, ranges, batch, seq, head_dim) for ranges in exchange.heads]
    for ranks in _stretches(heads):
        widths = [len(own) for own in heads[ranks.start]]
        messages = received.narrow(0, at, len(ranks) * seq * batch * sum(widths) * head_dim)
        at += messages.numel()
        messages = messages.view(len(ranks), seq, batch, sum(widths), head_dim)
        for tensor, ranges, part in zip(whole, exchange.heads, messages.split(widths, dim=3), strict=True):
            first = ranges[ranks.start]
            there = tensor.narrow(2, first.start, len(ranks) * len(first))
            there = there.view(batch, seq, len(ranks), len(first), head_dim).permute(2, 1, 0, 3, 4)
            if _are_apart(ranges):
                there.copy_(part)
            else:
                there += part
    return tuple(tensor.to(received.dtype) for tensor in whole)


def _are_apart(ranges: Sequence[range]) -> bool:
    """True if no two ranks have the same head."""
    return all(one.stop <= other.start for one, other in pairwise(own for own in ranges if own))


def _unfilled(received: Tensor, ranges: Sequence[range], batch: int, seq: int, head_dim: int) -> Tensor:
    """A place for heads to go; zeros to add to, as exactly as float32 does, where several ranks have one."""
    shape = batch, seq, max(own.stop for own in ranges), head_dim
    if _are_apart(ranges):
        return received.new_empty(shape)
    return received.new_zeros(shape, dtype=torch.promote_types(received.dtype, torch.float32))
