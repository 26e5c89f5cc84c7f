"""The all-to-all between a shard of the sequence and a shard of the heads.

`DTensor.redistribute` does the same, but on a CPU mesh it gathers the whole
tensor on every rank and throws most of it away, and it sends query, key and
value one after the other. This is the one place where the transition happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.problem import Tokens
from meshdiff.kept import kept_by_mesh
from meshdiff.shards import place_on
from meshdiff.simulation import on_each_rank

__all__ = ["Exchange", "all_to_all", "heads_to_sequence", "sequence_to_heads"]


def all_to_all(buffer: Tensor, output_sizes: Sequence[int], input_sizes: Sequence[int], mesh: DeviceMesh) -> Tensor:
    """What the other ranks of a 1-D mesh sent, one after the other; not differentiable.

    The operations that torch's functional collectives are made of. What is
    around them there, for graphs that are compiled, takes four times as long.

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


@kept_by_mesh
def _group_name(mesh: DeviceMesh) -> str:
    return mesh.get_group().group_name


@dataclass(frozen=True)
class Exchange:
    """Who holds how many tokens before, and which heads after, of tensors that travel together.

    Attributes:
        mesh: the ranks that exchange, on a 1-D mesh.
        tokens: the tokens of each of those ranks; one such list for each group,
            where a larger mesh is made of several groups that exchange apart.
        heads: for each tensor, the heads of each rank. Ranges may overlap: a
            head of key and value that several ranks need goes to each of them.
        group: which of the lists is this rank's.
        order: where the tokens of each rank are among all, if not those of one rank after those of another.
        of_queries: whether the first tensor is a query.
    """

    mesh: DeviceMesh
    tokens: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[range, ...], ...]
    group: int = 0
    order: tuple[Tokens, ...] | None = None
    of_queries: bool = True

    def places(self, group: int) -> tuple[Tokens, ...]:
        """Where the tokens of each rank of a group are among all of it."""
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
            _pack_heads(exchange, *shards),
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


@on_each_rank
def _pack_tokens(exchange: Exchange, rank: int, *shards: Tensor) -> Tensor:
    """Own tokens, for each other rank those of its heads."""
    parts = [
        shard.narrow(2, ranges[other].start, len(ranges[other])).transpose(1, 2)
        for other in range(exchange.mesh.size())
        for ranges, shard in zip(exchange.heads, shards, strict=True)
        if other != rank
    ]
    buffer = shards[0].new_empty(sum(part.numel() for part in parts))
    for message, part in zip(buffer.split([part.numel() for part in parts]), parts, strict=True):
        message.view(part.shape).copy_(part)
    return buffer


@on_each_rank
def _unpack_tokens(received: Tensor, exchange: Exchange, group: int, rank: int, *shards: Tensor) -> tuple[Tensor, ...]:
    """`[batch, seq, own heads, head_dim]`, the tokens where they belong."""
    tokens, (batch, _, _, head_dim) = exchange.tokens[group], shards[0].shape
    heads = [ranges[rank] for ranges in exchange.heads]
    others = [(other, i) for other in range(len(tokens)) if other != rank for i in range(len(shards))]
    messages = received.split([batch * len(heads[i]) * tokens[other] * head_dim for other, i in others])
    arrived = dict(zip(others, messages, strict=True))
    whole = []
    for i, (own, shard) in enumerate(zip(heads, shards, strict=True)):
        if exchange.of_queries and i == 0:
            tensor = shard.new_empty(batch, sum(tokens), len(own), head_dim).transpose(1, 2)
        else:
            tensor = shard.new_empty(batch, len(own), sum(tokens), head_dim)
        for other, places in enumerate(exchange.places(group)):
            if other == rank:
                rows = shard.narrow(2, own.start, len(own)).transpose(1, 2)
            else:
                rows = arrived[other, i].view(batch, len(own), tokens[other], head_dim)
            parts = rows.split([len(place) for place in places], dim=2) if len(places) > 1 else [rows]
            for place, part in zip(places, parts, strict=True):
                tensor.narrow(2, place.start, len(place)).copy_(part)
        whole.append(tensor.transpose(1, 2))
    return tuple(whole)


# From heads to tokens, a message holds [seq, batch, heads, head_dim], with the heads of all tensors
# side by side: for batch 1 what a kernel returns is the buffer to send.


@on_each_rank
def _pack_heads(exchange: Exchange, *shards: Tensor) -> Tensor:
    """Own heads of all tokens, those of one rank after those of another."""
    rows = [shard.transpose(0, 1) for shard in shards]
    if exchange.order is not None:
        places = [place for places in exchange.order for place in places]
        rows = [torch.cat([tensor[place.start : place.stop] for place in places]) for tensor in rows]
    return (torch.cat(rows, dim=2) if len(rows) > 1 else rows[0].contiguous()).view(-1)


@on_each_rank
def _unpack_heads(
    received: Tensor, exchange: Exchange, group: int, rank: int, batch: int, head_dim: int
) -> tuple[Tensor, ...]:
    """`[batch, own seq, heads, head_dim]`, from parts that each hold some of the heads of each tensor."""
    seq = exchange.tokens[group][rank]
    widths = [[len(own) for own in ranges] for ranges in zip(*exchange.heads, strict=True)]  # [rank][tensor]
    messages = received.split([seq * batch * sum(parts) * head_dim for parts in widths])
    views = [
        message.view(seq, batch, sum(parts), head_dim).transpose(0, 1).split(parts, dim=2)
        for message, parts in zip(messages, widths, strict=True)
    ]
    return tuple(_join([parts[i] for parts in views], ranges) for i, ranges in enumerate(exchange.heads))


def _join(parts: list[Tensor], ranges: tuple[range, ...]) -> Tensor:
    if all(one.stop <= other.start for one, other in pairwise(own for own in ranges if own)):
        return torch.cat(parts, dim=2)
    batch, seq, _, head_dim = parts[0].shape
    heads, dtype = max(own.stop for own in ranges), torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].new_zeros(batch, seq, heads, head_dim, dtype=dtype)
    for part, own in zip(parts, ranges, strict=True):
        total[:, :, own.start : own.stop] += part
    return total.to(parts[0].dtype)
