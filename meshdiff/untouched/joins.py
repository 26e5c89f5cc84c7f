"""Functions of joined rows, done on what is joined: f(cat(a, b)) is cat(f(a), f(b)) if f goes row by row.

Between the join of text and image and their attention, models turn queries and
keys by their positions; afterwards they cut the result apart. So the join need
not be made: attention takes the tokens of both from where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_leaves

from meshdiff.attention import joint_attention
from meshdiff.attention.local import contiguous_stride
from meshdiff.untouched.cuts import plain_index
from meshdiff.untouched.known import POINTWISE, RESHAPES
from meshdiff.untouched.rows import Piece
from meshdiff.untouched.tensors import dtensors, map_tensors, sharded_dim, swapped, to_plain

if TYPE_CHECKING:
    from meshdiff.untouched.functions import OnShards

__all__ = ["BY_PARTS", "attention_of_joins", "by_parts"]

CASTS = {Tensor.float, Tensor.type_as, Tensor.to}
UNBINDS = {Tensor.unbind, torch.unbind}
VIEWS = RESHAPES | {Tensor.permute, Tensor.transpose, torch.permute, torch.transpose, Tensor.__getitem__, *UNBINDS}
BY_PARTS = POINTWISE | VIEWS | {torch.stack}


@dataclass(frozen=True)
class Join:
    """The parts of a join that waits: along which dim, counted from the end, and how many rows each has."""

    parts: tuple[DTensor, ...]
    dim: int
    sizes: tuple[int, ...]


def join_of(on: OnShards, tensor: Any) -> Join | None:
    """The parts of a tensor, if it is a join that waits."""
    parts = on.pending.parts(tensor)
    dim = sharded_dim(tensor) if parts is not None else None
    if parts is None or dim is None:
        return None
    return Join(parts, dim - tensor.ndim, tuple(part.shape[dim] for part in parts))


def by_parts(on: OnShards, func: Any, args: Any, kwargs: Any) -> Any:
    """What a function makes of joins that wait, as joins that wait; NotImplemented where it does not go row by row."""
    joins = {id(tensor): join for tensor in dtensors((args, kwargs)) if (join := join_of(on, tensor)) is not None}
    if not joins or not _goes_by_rows(func, args, kwargs, joins):
        return NotImplemented
    outlines = on.known.outlines(func, args, kwargs)
    if outlines is None:
        return NotImplemented
    join = next(iter(joins.values()))
    if func in CASTS and outlines[0].dtype == args[0].dtype:
        return args[0]  # as torch does
    made = []
    for i in range(len(join.sizes)):
        own_args, own_kwargs = _of_part(joins, i, args, kwargs)
        if func in RESHAPES:
            at = args[0].ndim + join.dim
            if outlines[0].shape[: at + 1] != args[0].shape[: at + 1]:
                return NotImplemented
            shape = (*outlines[0].shape[:at], join.sizes[i], *outlines[0].shape[at + 1 :])
            made.append(on.run(torch.reshape, (own_args[0], shape), {}))
        else:
            made.append(on.run(func, own_args, own_kwargs))
    several = type(made[0]) if isinstance(made[0], (tuple, list)) else None
    rows = [tuple(made)] if several is None else list(zip(*made, strict=True))
    for tensor in dtensors((args, kwargs)):
        on.pending.use(tensor)
    results = [_joined(on, own, outline, join.sizes) for own, outline in zip(rows, outlines, strict=True)]
    if any(result is None for result in results):
        return NotImplemented
    if func in VIEWS:
        on.viewed(args[0], *(result for result in results if result is not None))
    return results[0] if several is None else several(results)


def _goes_by_rows(func: Any, args: Any, kwargs: Any, joins: dict[int, Join]) -> bool:
    """Whether each part of the result comes of the same part of all joins, and of what is whole; without gradients."""
    if torch.is_grad_enabled() and any(
        leaf.requires_grad for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
    ):
        return False
    if len({(join.dim, join.sizes) for join in joins.values()}) != 1:
        return False
    if any(id(t) not in joins and not t.placements[0].is_replicate() for t in dtensors((args, kwargs))):
        return False
    if func in VIEWS or func in CASTS:
        if not args or id(args[0]) not in joins:
            return False
        if func in RESHAPES and any(isinstance(arg, torch.dtype) for arg in args):
            return False
        if func is Tensor.to:  # another device, or a copy, is none of this
            return not kwargs and all(isinstance(arg, torch.dtype) for arg in args[1:])
        if func is Tensor.__getitem__:
            index = plain_index(*args)
            return index is not None and not index.is_number and index.entry == (0, args[0].shape[index.dim])
        if func in UNBINDS:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return (dim % args[0].ndim) - args[0].ndim != joins[id(args[0])].dim
    return True


def _of_part(joins: dict[int, Join], i: int, args: Any, kwargs: Any) -> Any:
    """The arguments for part `i`: of joins that part, of whole tensors the rows that go with it."""
    join = next(iter(joins.values()))
    total, start = sum(join.sizes), sum(join.sizes[:i])

    def part(tensor: Tensor) -> Tensor:
        if id(tensor) in joins:
            return joins[id(tensor)].parts[i]
        goes_along = tensor.ndim >= -join.dim and tensor.shape[join.dim] == total != 1
        return tensor.narrow(join.dim, start, join.sizes[i]) if goes_along else tensor

    return map_tensors(Tensor, part, args), {name: map_tensors(Tensor, part, kwargs[name]) for name in kwargs}


def _joined(on: OnShards, rows: tuple[DTensor, ...], outline: Tensor, sizes: tuple[int, ...]) -> DTensor | None:
    """The join of results; None if they are no rows of what the function makes of the whole."""
    if not all(isinstance(own, DTensor) for own in rows):  # it ran on whole tensors
        return None
    dims = {own.placements[0].dim for own in rows if isinstance(own.placements[0], Shard)}
    if len(dims) != 1 or not all(own.placements[0].is_replicate() or sharded_dim(own) is not None for own in rows):
        return None
    (dim,) = dims
    expected = [(*outline.shape[:dim], size, *outline.shape[dim + 1 :]) for size in sizes]
    if outline.shape[dim] != sum(sizes) or [tuple(own.shape) for own in rows] != expected:
        return None
    pieces = [Piece(i, 0, size) for i, size in enumerate(sizes)]
    return on.pending.rearrange(rows, [pieces], dim, outline.stride())[0]


def attention_of_joins(
    on: OnShards, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Any:
    """Attention `[batch, heads, seq, head_dim]` over two sequences as one; NotImplemented if these are others."""
    joins = [join for tensor in (query, key, value) if (join := join_of(on, tensor)) is not None]
    if len(joins) < 3 or len({(join.dim, join.sizes) for join in joins}) > 1:
        return NotImplemented
    sizes = joins[0].sizes
    if joins[0].dim != -2 or len(sizes) != 2 or not all(sizes):
        return NotImplemented
    if isinstance(mask, DTensor):
        on.look_at(mask)
        mask = to_plain(mask)
    on.on_attention(query, key, True)
    for tensor in (query, key, value):
        on.pending.use(tensor)
    with on.unguarded():
        (q1, q2), (k1, k2), (v1, v2) = (
            [
                swapped(part if part.placements[0] == Shard(2) else part.redistribute(placements=[Shard(2)]))
                for part in join.parts
            ]
            for join in joins
        )
        second, first = joint_attention(
            (q2, k2, v2), (q1, k1, v1), attn_mask=mask, is_causal=is_causal, scale=scale, strategy=on.strategy
        )
        rows = [swapped(part) for part in (first, second)]
        batch, heads, seq, head_dim = query.shape
        of_batch, of_seq, of_head, _ = contiguous_stride(torch.Size((batch, seq, heads, head_dim)))
        stride = of_batch, of_head, of_seq, 1
        return on.pending.rearrange(rows, [[Piece(i, 0, size) for i, size in enumerate(sizes)]], 2, stride)[0]
