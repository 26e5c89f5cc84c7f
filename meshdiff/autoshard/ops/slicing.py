"""Cutting and joining, by functions of torch: `cat`, slices, `split` and the like along the sharded dim.

DTensor would gather; here an exchange moves only the rows whose owner changes, see `reshard`. Names in quotes are those
of programs in tests/autoshard/test_dtensor_rules.py, see `op_traits`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshdiff.attention.problem import chunk_sizes
from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import as_replicated, sharded_dim, to_plain
from meshdiff.autoshard.registry import Handlers
from meshdiff.autoshard.reshard import SourceSlice
from meshdiff.distributed.placements import REPLICATED
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["HANDLERS", "plain_index"]

HANDLERS = Handlers()


@HANDLERS.of(torch.cat, torch.concat, torch.concatenate)
def _cat(ctx: ShardingContext, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    ndim = tensors[0].ndim
    others = {(*tensor.shape[: dim % ndim], *tensor.shape[dim % ndim + 1 :]) for tensor in tensors}
    if kwargs or not -ndim <= dim < ndim or len(others) > 1 or len({tensor.ndim for tensor in tensors}) > 1:
        return NotImplemented
    dim %= ndim
    if {sharded_dim(tensor) for tensor in tensors} - {None} != {dim}:
        return _cat_of_some(ctx, tensors, dim)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    sources = [as_replicated(tensor if tensor.dtype == dtype else tensor.to(dtype), ctx.mesh) for tensor in tensors]
    pieces = [SourceSlice(i, 0, tensor.shape[dim]) for i, tensor in enumerate(tensors)]
    return ctx.reshard(sources, [pieces], dim)[0]


def _cat_of_some(ctx: ShardingContext, tensors: Sequence[Tensor], dim: int) -> Any:
    """Along another dim, without those that are empty: see "view of nothing"."""
    some = [tensor for tensor in tensors if tensor.shape[dim]]
    if not 0 < len(some) < len(tensors) or len({tensor.dtype for tensor in tensors}) > 1:
        return NotImplemented
    return ctx.run(torch.cat, (some, dim), {}) if len(some) > 1 else ctx.run(torch.clone, (some[0],), {})


def _cut(ctx: ShardingContext, tensor: DTensor, sizes: Sequence[int], dim: int) -> tuple[DTensor, ...]:
    """Consecutive parts of the sharded dim."""
    bounds = itertools.accumulate(sizes, initial=0)
    parts = ctx.reshard([tensor], [[SourceSlice(0, a, b)] for a, b in itertools.pairwise(bounds)], dim, views=True)
    ctx.viewed(tensor, *parts)
    return tuple(parts)


@HANDLERS.of(torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes)
def _split(ctx: ShardingContext, tensor: DTensor, split_size_or_sections: Any, dim: int = 0) -> Any:
    if not -tensor.ndim <= dim < tensor.ndim:
        return NotImplemented
    dim %= tensor.ndim
    length, sizes = tensor.shape[dim], split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)] if sizes > 0 else []
    if sum(sizes) != length or not length:
        return NotImplemented
    if sharded_dim(tensor) != dim:
        return _slices(ctx, tensor, sizes, dim)
    return _cut(ctx, tensor, sizes, dim)


def _slices(ctx: ShardingContext, tensor: DTensor, sizes: Sequence[int], dim: int) -> Any:
    """Consecutive parts of another dim, each with a gradient of its own: see "gradient of a part of a split"."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return NotImplemented
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        ctx.run(torch.narrow, (tensor, dim, start, size), {}) for start, size in zip(starts, sizes, strict=True)
    )


@HANDLERS.of(torch.chunk, Tensor.chunk)
def _chunk(ctx: ShardingContext, tensor: DTensor, chunks: int, dim: int = 0) -> Any:
    if not -tensor.ndim <= dim < tensor.ndim or chunks < 1:
        return NotImplemented
    return _split(ctx, tensor, [size for size in chunk_sizes(tensor.shape[dim], chunks) if size], dim)


@HANDLERS.of(torch.narrow, Tensor.narrow)
def _narrow(ctx: ShardingContext, tensor: DTensor, dim: int, start: Any, length: int) -> Any:
    if not -tensor.ndim <= dim < tensor.ndim or sharded_dim(tensor) != dim % tensor.ndim or type(start) is not int:
        return NotImplemented
    total = tensor.shape[dim]
    first = start + total if start < 0 else start
    if not 0 <= first <= first + length <= total:
        return NotImplemented
    return _rows(ctx, tensor, first, length, dim % tensor.ndim)


def _rows(ctx: ShardingContext, tensor: DTensor, start: int, length: int, dim: int) -> DTensor:
    (part,) = ctx.reshard([tensor], [[SourceSlice(0, start, start + length)]], dim, views=True)
    ctx.viewed(tensor, part)
    return part


@HANDLERS.of(Tensor.__getitem__)
def _getitem(ctx: ShardingContext, tensor: Tensor, index: Any) -> Any:
    plain = plain_index(tensor, index)
    if plain is None:
        return NotImplemented
    place, entry, dim = plain.place, plain.entry, plain.dim
    start, stop = entry
    if (start, stop) == (0, tensor.shape[dim]):
        return NotImplemented
    assert isinstance(tensor, DTensor)
    if plain.is_number:  # a row that a rank has, for everyone
        row = _rows(ctx, tensor, start, 1, dim)
        ctx.materialize(row)
        part = DTensor.from_local(
            to_plain(row), ctx.mesh, [REPLICATED], run_check=False, shape=row.shape, stride=row.stride()
        )
        ctx.viewed(tensor, part)
        rest: int | slice = 0
    else:
        part, rest = _rows(ctx, tensor, start, max(0, stop - start), dim), slice(None)
        if all(entry == slice(None) for entry in plain.others):
            return part
    return ctx.run(Tensor.__getitem__, (part, (*plain.index[:place], rest, *plain.index[place + 1 :])), {})


@HANDLERS.of(Tensor.__setitem__)
def _setitem(ctx: ShardingContext, tensor: Tensor, index: Any, value: Any) -> Any:
    plain = plain_index(tensor, index)
    if plain is None or plain.is_number or not isinstance(value, Tensor):  # "write of a number" gathers
        return NotImplemented
    (start, stop), dim = plain.entry, plain.dim
    length = tensor.shape[dim]
    if (start, stop) == (0, length):
        return _write_to_own_rows(ctx, tensor, plain, value)
    written_to = (*tensor.shape[:dim], stop - start, *tensor.shape[dim + 1 :])
    if (
        tuple(value.shape) != written_to
        or any(entry != slice(None) for entry in plain.others)
        or value.dtype != tensor.dtype
    ):
        return NotImplemented
    assert isinstance(tensor, DTensor)
    source = as_replicated(value, ctx.mesh)
    if sharded_dim(source) not in (None, dim):
        return NotImplemented
    pieces = [SourceSlice(0, 0, start), SourceSlice(1, 0, stop - start), SourceSlice(0, stop, length)]
    (written,) = ctx.reshard([tensor, source], [[piece for piece in pieces if len(piece)]], dim)
    tensor.copy_(written)
    return None


def _write_to_own_rows(ctx: ShardingContext, tensor: Tensor, index: PlainIndex, value: Tensor) -> Any:
    """Each rank writes to all of its rows what it has for them; to begin with, DTensor says whether this is right."""
    own = sharded_dim(value)
    if not ctx.does_again() or any(not isinstance(entry, slice) for entry in index.others):
        return NotImplemented
    if own is None or own - value.ndim != index.dim - tensor.ndim or value.shape[own] != tensor.shape[index.dim]:
        return NotImplemented
    ctx.materialize(tensor, value)
    ctx.materialize_all()  # rows that wait for what is there now
    if ctx.aliases.has_live_aliases(tensor):
        return NotImplemented
    assert isinstance(tensor, DTensor)
    assert isinstance(value, DTensor)
    with ctx.unguarded():
        _write_each(tensor.to_local(), index.index, value.to_local())
    ctx.aliases.writes += 1
    torch.autograd.graph.increment_version(tensor)
    return None


@on_each_rank
def _write_each(own: Tensor, index: tuple[Any, ...], value: Tensor) -> None:
    own[index] = value


class PlainIndex:
    """An index of slices and numbers, and what it does to the sharded dim."""

    def __init__(self, index: tuple[Any, ...], place: int, dim: int, length: int) -> None:
        self.index, self.place, self.dim = index, place, dim
        self.others = [entry for i, entry in enumerate(index) if i != place]
        given = index[place]
        self.is_number = not isinstance(given, slice)
        self.entry = (given % length, given % length + 1) if self.is_number else given.indices(length)[:2]


def plain_index(tensor: Tensor, index: Any) -> PlainIndex | None:
    """The entry of an index for the sharded dim, and the others; None if it has none, or is not simple."""
    dim = sharded_dim(tensor)
    entries = index if isinstance(index, tuple) else (index,)
    if dim is None or not all(
        entry is None or isinstance(entry, (slice, EllipsisType)) or type(entry) is int for entry in entries
    ):
        return None
    taken = sum(entry is not None and not isinstance(entry, EllipsisType) for entry in entries)
    missing = (slice(None),) * (tensor.ndim - taken)
    if any(isinstance(entry, EllipsisType) for entry in entries):
        place = next(i for i, entry in enumerate(entries) if isinstance(entry, EllipsisType))
        entries = (*entries[:place], *missing, *entries[place + 1 :])
    else:
        entries = (*entries, *missing)
    places = [i for i, entry in enumerate(entries) if entry is not None]
    if len(places) <= dim:
        return None
    given = entries[places[dim]]
    length = tensor.shape[dim]
    if isinstance(given, slice):
        simple = given.step in (None, 1) and all(b is None or type(b) is int for b in (given.start, given.stop))
    else:
        simple = -length <= given < length
    return PlainIndex(entries, places[dim], dim, length) if simple and length else None


@HANDLERS.of(torch.unbind, Tensor.unbind)
def _unbind(ctx: ShardingContext, tensor: DTensor, dim: int = 0) -> Any:
    if not -tensor.ndim <= dim < tensor.ndim:
        return NotImplemented
    dim %= tensor.ndim
    if sharded_dim(tensor) != dim:
        if torch.is_grad_enabled() and tensor.requires_grad:  # "gradient of a part of an unbind"
            return tuple(ctx.run(torch.select, (tensor, dim, i), {}) for i in range(tensor.shape[dim]))
        return NotImplemented
    whole = as_replicated(to_plain(tensor), ctx.mesh)
    ctx.on_gather("unbind", "each row of a sharded dim is to be a tensor")
    ctx.viewed(tensor, whole)
    return tuple(whole.select(dim, i) for i in range(tensor.shape[dim]))  # see `_slices`
