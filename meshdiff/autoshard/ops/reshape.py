"""Views that take the sharded dim apart, or merge it with others, where the ranks do not divide it.

Rows of pixels become tokens in this way, `[batch, channels, height, width]` to `[batch, channels, height * width]`.
DTensor does it where all ranks have equal parts before and after; else a few entries have to move, see `halo`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from meshdiff.attention.problem import chunk_ranges
from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import is_differentiated, sharded_dim
from meshdiff.autoshard.halo import Halo, Rows, with_halo
from meshdiff.autoshard.registry import Handlers
from meshdiff.distributed.local_shards import contiguous_stride, place_on, to_shard, wrap
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["HANDLERS"]

HANDLERS = Handlers()


def _register(function: Any) -> None:
    @HANDLERS.of(function)
    def reshape(ctx: ShardingContext, tensor: DTensor, *sizes: Any, **named: Any) -> Any:
        """A view in which the sharded dim is merged with others, or taken apart.

        Then that dim is sharded which was when dims of these sizes were merged before, or else the outermost.
        """
        dim = sharded_dim(tensor)
        if dim is None or not ctx.of_images or not tensor.numel() or is_differentiated(tensor):
            return NotImplemented
        if any(isinstance(size, torch.dtype) for size in sizes):
            return NotImplemented
        shape = function(torch.empty(tensor.shape, device="meta"), *sizes, **named).shape
        group = _group(tensor.shape, shape, dim)
        if group is None:
            return NotImplemented
        ranks, _ = place_on(ctx.mesh)
        old, new = tensor.shape[group.first : group.end], shape[group.place : group.made]
        place = ctx.merged.get(new, 0)
        if len(new) == 1:
            ctx.merged[tuple(size for size in old if size != 1)] = sum(size != 1 for size in old[: dim - group.first])
        if (
            math.prod(old[: dim - group.first]) == 1
            and place == 0
            and not old[dim - group.first] % ranks
            and not new[0] % ranks
        ):
            return NotImplemented
        held, wanted = _entries(old, dim - group.first, ranks), _entries(new, place, ranks)
        ctx.materialize(tensor)
        if ctx.recorder is not None:
            ctx.recorder.on_function(function.__name__)
        with ctx.unguarded():
            entries = _flat(to_shard(tensor), group.first, group.end)
            entries = with_halo(entries, Halo(held, wanted, math.prod(old)), group.first, ctx.mesh)
            local = _as_rows(entries, shape, group.place + place)
        result = wrap(local, ctx.mesh, Shard(group.place + place), shape, contiguous_stride(shape))
        ctx.viewed(tensor, result)
        return result


class Group(NamedTuple):
    """Dims that become other dims of as many entries.

    Attributes:
        first, end: the range of the old dims.
        place, made: the outermost of the new dims that has more than one entry, and the end of them.
    """

    first: int
    end: int
    place: int
    made: int


def _group(old: torch.Size, new: torch.Size, dim: int) -> Group | None:
    """The dims that are merged with `dim` or made of it; None if it stays as it is."""
    i = j = 0
    while True:
        first, place, size, made = i, j, old[i], 1
        i += 1
        while made != size:
            if made < size:
                made, j = made * new[j], j + 1
            else:
                size, i = size * old[i], i + 1
        if dim < i:
            break
    place = next((own for own in range(place, j) if new[own] != 1), j)
    if place == j or (new[place] == old[dim] and math.prod(old[first:dim]) == 1):
        return None
    return Group(first, i, place, j)


@lru_cache(maxsize=1024)
def _entries(sizes: torch.Size, dim: int, ranks: int) -> tuple[Rows, ...]:
    """The entries of dims, as one, that each rank has if one of them is sharded."""
    inner, row = math.prod(sizes[dim:]), math.prod(sizes[dim + 1 :])
    return tuple(
        tuple(range(i * inner + own.start * row, i * inner + own.stop * row) for i in range(math.prod(sizes[:dim])))
        if own
        else ()
        for own in chunk_ranges(sizes[dim], ranks)
    )


@on_each_rank
def _flat(shard: Tensor, first: int, end: int) -> Tensor:
    """The dims `first` to `end` as one."""
    return shard.reshape((*shard.shape[:first], math.prod(shard.shape[first:end]), *shard.shape[end:]))


@on_each_rank
def _as_rows(entries: Tensor, shape: torch.Size, place: int) -> Tensor:
    """The shard of a tensor of that shape, from the entries of its dims as one."""
    rows = entries.numel() // math.prod((*shape[:place], *shape[place + 1 :]))
    return entries.reshape((*shape[:place], rows, *shape[place + 1 :])).contiguous()


for _name in ("view", "reshape", "flatten", "unflatten"):
    for _where in (torch, Tensor):
        if hasattr(_where, _name):
            _register(getattr(_where, _name))
