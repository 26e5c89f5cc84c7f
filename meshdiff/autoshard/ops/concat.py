"""Functions of joined rows, done on what is joined: f(cat(a, b)) is cat(f(a), f(b)) if f goes row by row.

Between the join of text and image and their attention, models turn queries and
keys by their positions; afterwards they cut the result apart. So the join need
not be made: a rank lays its rows of both side by side, and nothing is sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from meshdiff.attention.joint import attend_beside
from meshdiff.attention.problem import chunk_ranges
from meshdiff.attention.validation import check_ranks
from meshdiff.autoshard.aliasing import memory
from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import dtensors, map_tensors, sharded_dim, to_plain
from meshdiff.autoshard.op_cache import cache_key, run_on_shards
from meshdiff.autoshard.op_traits import traits_of
from meshdiff.autoshard.ops.slicing import plain_index
from meshdiff.autoshard.reshard import SourceSlice
from meshdiff.distributed.local_shards import contiguous_stride, place_on, wrap
from meshdiff.distributed.simulation import on_each_rank
from meshdiff.distributed.torch_compat import tree_leaves

__all__ = ["attention_of_joins", "by_parts"]

QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Join:
    """The parts of a join that waits: along which dim, counted from the end, and how many rows each has."""

    parts: tuple[DTensor, ...]
    dim: int
    sizes: tuple[int, ...]


def join_of(ctx: ShardingContext, tensor: Any) -> Join | None:
    """The parts of a tensor, if it is a join that waits."""
    parts = ctx.lazy.parts(tensor)
    dim = sharded_dim(tensor) if parts is not None else None
    if parts is None or dim is None:
        return None
    return Join(parts, dim - tensor.ndim, tuple(part.shape[dim] for part in parts))


def by_parts(ctx: ShardingContext, func: Any, args: Any, kwargs: Any) -> Any:
    """Result of a function of joins that wait, as joins that wait; NotImplemented where it does not go row by row."""
    given = list(dtensors((args, kwargs)))
    joins = {id(tensor): join for tensor in given if (join := join_of(ctx, tensor)) is not None}
    if not joins:
        return NotImplemented
    key = cache_key(func, args, kwargs) if ctx.does_again() else None
    if key is not None:
        key = (*key, *(join.sizes if (join := joins.get(id(tensor))) is not None else None for tensor in given))
        if (known := ctx.op_cache.get_joined(key)) is not None:
            return _again(ctx, known, func, args, kwargs, joins)
    if not _goes_by_rows(func, args, kwargs, joins):
        return NotImplemented
    outlines = ctx.op_cache.outlines(func, args, kwargs)
    if outlines is None:
        return NotImplemented
    join = next(iter(joins.values()))
    if traits_of(func).casts and outlines[0].dtype == args[0].dtype:
        return args[0]  # as torch does
    made = []
    for i in range(len(join.sizes)):
        own_args, own_kwargs = _of_part(joins, i, args, kwargs)
        if traits_of(func).reshapes:
            at = args[0].ndim + join.dim
            if outlines[0].shape[: at + 1] != args[0].shape[: at + 1]:
                return NotImplemented
            shape = (*outlines[0].shape[:at], join.sizes[i], *outlines[0].shape[at + 1 :])
            made.append(ctx.run(torch.reshape, (own_args[0], shape), {}))
        else:
            made.append(ctx.run(func, own_args, own_kwargs))
    several = type(made[0]) if isinstance(made[0], (tuple, list)) else None
    rows = [tuple(made)] if several is None else list(zip(*made, strict=True))
    dims = [_joined_dim(own, outline, join.sizes) for own, outline in zip(rows, outlines, strict=True)]
    if None in dims:
        return NotImplemented
    outlined = tuple((tuple(one.shape), one.stride()) for one in outlines)
    known = Joined(outlined, tuple(dim for dim in dims if dim is not None), several)
    if key is not None:
        ctx.op_cache.insert_joined(key, known)
    return _waiting(ctx, known, rows, func, args, kwargs, join.sizes)


@dataclass(frozen=True)
class Joined:
    """Form of a function's results of joins: for each, shape and stride on one device, and the dim that is joined."""

    outlines: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    dims: tuple[int, ...]
    several: type | None


def _again(ctx: ShardingContext, known: Joined, func: Any, args: Any, kwargs: Any, joins: dict[int, Join]) -> Any:
    """On this rank's rows of all parts, side by side, by what is known of the result."""
    join = next(iter(joins.values()))
    ranks, rank = place_on(ctx.mesh)

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) in joins:
            return _side_by_side(ctx, tensor, joins[id(tensor)])
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return _rows_of_each(local, join.dim, join.sizes, ranks, rank) if _goes_along(tensor, join) else local

    with ctx.unguarded():
        own_args, own_kwargs = map_tensors(Tensor, own, args), {n: map_tensors(Tensor, own, kwargs[n]) for n in kwargs}
        if traits_of(func).reshapes:
            made: Any = _reshaped(own_args[0], known.outlines[0][0], known.dims[0])
        else:
            made = run_on_shards(func, own_kwargs, *own_args)
        rows = [
            _parts(ctx, tensor, shape, stride, dim, join.sizes)
            for tensor, (shape, stride), dim in zip(
                [made] if known.several is None else made, known.outlines, known.dims, strict=True
            )
        ]
    return _waiting(ctx, known, rows, func, args, kwargs, join.sizes)


def _waiting(
    ctx: ShardingContext,
    known: Joined,
    rows: Sequence[Sequence[DTensor]],
    func: Any,
    args: Any,
    kwargs: Any,
    sizes: Sequence[int],
) -> Any:
    """The results, as joins that wait."""
    for tensor in dtensors((args, kwargs)):
        ctx.lazy.use(tensor)
    pieces = [SourceSlice(i, 0, size) for i, size in enumerate(sizes)]
    results = [
        ctx.lazy.reshard(own, [pieces], dim, stride)[0]
        for own, (_, stride), dim in zip(rows, known.outlines, known.dims, strict=True)
    ]
    if traits_of(func).view:
        ctx.viewed(args[0], *results)
    return results[0] if known.several is None else known.several(results)


def _side_by_side(ctx: ShardingContext, tensor: Tensor, join: Join) -> Tensor:
    """This rank's rows of all parts of a join; from then on, they are taken from there."""
    dim = tensor.ndim + join.dim
    replicated = tuple(part.placements[0].is_replicate() for part in join.parts)
    own = [part.to_local() for part in join.parts]
    rows = _lay(dim, join.sizes, replicated, *place_on(ctx.mesh), *own)
    if memory(rows)._cdata != memory(own[0])._cdata:
        ctx.lazy.redirect(tensor, _parts(ctx, rows, tensor.shape, tensor.stride(), dim, join.sizes))
    return rows


@on_each_rank
def _lay(dim: int, sizes: Sequence[int], replicated: Sequence[bool], ranks: int, rank: int, *parts: Tensor) -> Tensor:
    """Rows of each part one after the other; a copy, unless that is how they lie already."""
    if not any(replicated) and (there := _adjoining(parts, dim)) is not None:
        return there
    ranges = [chunk_ranges(size, ranks)[rank] for size in sizes]
    return torch.cat(
        [
            part.narrow(dim, rows.start, len(rows)) if is_replicated else part
            for part, rows, is_replicated in zip(parts, ranges, replicated, strict=True)
        ],
        dim,
    )


def _adjoining(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """Parts that lie one after the other in memory, as one tensor."""
    first, rows = parts[0], 0
    for part in parts:
        at = first.storage_offset() + rows * first.stride(dim)
        if (
            part.stride() != first.stride()
            or part.storage_offset() != at
            or memory(part)._cdata != memory(first)._cdata
        ):
            return None
        rows += part.shape[dim]
    return first.as_strided((*first.shape[:dim], rows, *first.shape[dim + 1 :]), first.stride())


def _parts(
    ctx: ShardingContext, rows: Tensor, shape: Sequence[int], stride: tuple[int, ...], dim: int, sizes: Sequence[int]
) -> tuple[DTensor, ...]:
    """The parts that lie side by side on each rank."""
    views = _views(rows, dim, tuple(sizes), *place_on(ctx.mesh))
    return tuple(
        wrap(view, ctx.mesh, Shard(dim), torch.Size((*shape[:dim], size, *shape[dim + 1 :])), stride)
        for view, size in zip(views, sizes, strict=True)
    )


@on_each_rank
def _views(rows: Tensor, dim: int, sizes: Sequence[int], ranks: int, rank: int) -> tuple[Tensor, ...]:
    return rows.split_with_sizes([len(chunk_ranges(size, ranks)[rank]) for size in sizes], dim)


@on_each_rank
def _rows_of_each(tensor: Tensor, dim: int, sizes: Sequence[int], ranks: int, rank: int) -> Tensor:
    """Rows of a replicated tensor that belong to this rank's rows of all parts of the join."""
    starts = itertools.accumulate(sizes, initial=0)
    ranges = [chunk_ranges(size, ranks, start)[rank] for size, start in zip(sizes, starts, strict=False)]
    return torch.cat([tensor.narrow(dim, own.start, len(own)) for own in ranges], dim)


@on_each_rank
def _reshaped(tensor: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Torch finds the rows of this rank: all other dims are given."""
    return tensor.reshape(*shape[:dim], -1, *shape[dim + 1 :])


def _goes_by_rows(func: Any, args: Any, kwargs: Any, joins: dict[int, Join]) -> bool:
    """True if each part of the result needs only that part of all joins and replicated tensors, without gradients."""
    if torch.is_grad_enabled() and any(
        leaf.requires_grad for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
    ):
        return False
    if len({(join.dim, join.sizes) for join in joins.values()}) != 1:
        return False
    if any(id(t) not in joins and not t.placements[0].is_replicate() for t in dtensors((args, kwargs))):
        return False
    traits = traits_of(func)
    if traits.view or traits.casts:
        if not args or id(args[0]) not in joins:
            return False
        if traits.reshapes and any(isinstance(arg, torch.dtype) for arg in args):
            return False
        if func is Tensor.to:  # another device, or a copy, is none of this
            return not kwargs and all(isinstance(arg, torch.dtype) for arg in args[1:])
        if func is Tensor.__getitem__:
            index = plain_index(*args)
            return index is not None and not index.is_number and index.entry == (0, args[0].shape[index.dim])
        if traits.unbinds:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return (dim % args[0].ndim) - args[0].ndim != joins[id(args[0])].dim
    return True


def _of_part(joins: dict[int, Join], i: int, args: Any, kwargs: Any) -> Any:
    """The arguments for part `i`: of joins that part, of replicated tensors the rows that belong to it."""
    join = next(iter(joins.values()))
    start = sum(join.sizes[:i])

    def part(tensor: Tensor) -> Tensor:
        if id(tensor) in joins:
            return joins[id(tensor)].parts[i]
        return tensor.narrow(join.dim, start, join.sizes[i]) if _goes_along(tensor, join) else tensor

    return map_tensors(Tensor, part, args), {name: map_tensors(Tensor, part, kwargs[name]) for name in kwargs}


def _goes_along(tensor: Tensor, join: Join) -> bool:
    """True if a replicated tensor has a row for each row of the join."""
    return tensor.ndim >= -join.dim and tensor.shape[join.dim] == sum(join.sizes) != 1


def _joined_dim(rows: tuple[DTensor, ...], outline: Tensor, sizes: tuple[int, ...]) -> int | None:
    """The dim along which results of the parts are rows of the function's full result; None if they are not."""
    if not all(isinstance(own, DTensor) for own in rows):  # it ran on replicated tensors
        return None
    dims = {own.placements[0].dim for own in rows if isinstance(own.placements[0], Shard)}
    if len(dims) != 1 or not all(own.placements[0].is_replicate() or sharded_dim(own) is not None for own in rows):
        return None
    (dim,) = dims
    expected = [(*outline.shape[:dim], size, *outline.shape[dim + 1 :]) for size in sizes]
    return dim if outline.shape[dim] == sum(sizes) and [tuple(own.shape) for own in rows] == expected else None


def attention_of_joins(
    ctx: ShardingContext,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Any:
    """Attention `[batch, heads, seq, head_dim]` over two sequences as one; NotImplemented if these are others."""
    joins = [join for tensor in (query, key, value) if (join := join_of(ctx, tensor)) is not None]
    if len(joins) < 3 or len({(join.dim, join.sizes) for join in joins}) > 1:
        return NotImplemented
    sizes = joins[0].sizes
    if joins[0].dim != -2 or not all(sizes):
        return NotImplemented
    if isinstance(mask, DTensor):
        ctx.materialize(mask)
        mask = to_plain(mask)
    ctx.on_attention(query, key, True)
    for tensor in (query, key, value):
        ctx.lazy.use(tensor)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "strategy": ctx.strategy}
    with ctx.unguarded():
        parts = {
            f"{name} {i}": part for name, join in zip(QKV, joins, strict=True) for i, part in enumerate(join.parts)
        }
        check_ranks({**parts, "attn_mask": mask}, **options)
        rows = [
            _side_by_side(ctx, tensor, join).transpose(1, 2)
            for tensor, join in zip((query, key, value), joins, strict=True)
        ]
        attended = attend_beside(ctx.mesh, sizes, *rows, attn_mask=mask, **options).transpose(1, 2)
        batch, heads, seq, head_dim = query.shape
        of_batch, of_seq, of_head, _ = contiguous_stride(torch.Size((batch, seq, heads, head_dim)))
        stride = of_batch, of_head, of_seq, 1
        made = _parts(ctx, attended, query.shape, stride, 2, sizes)
        return ctx.lazy.reshard(made, [[SourceSlice(i, 0, size) for i, size in enumerate(sizes)]], 2, stride)[0]
