"""Padding, resizing, pooling and shuffles of pixels: rows that are made of rows near them, see `halo`.

Layouts are torch's, `[batch, channels, (frames,) height, width]`. What needs rows of other ranks runs on replicated
tensors if gradients are wanted; zeros that are added along the sharded dim have gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import is_differentiated, sharded_dim
from meshdiff.autoshard.halo import Picked, Window, by_window
from meshdiff.autoshard.registry import Handlers, by_shard
from meshdiff.autoshard.reshard import SourceSlice

__all__ = ["HANDLERS"]

HANDLERS = Handlers()

Sizes = int | Sequence[int]


@HANDLERS.of(F.pad)
def _pad(ctx: ShardingContext, input: DTensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    """Padding; zeros along the sharded dim wait until they are read, and a convolution does without them."""
    dim = sharded_dim(input)
    if dim is None or len(pad) % 2 or len(pad) > 2 * input.ndim:
        return NotImplemented
    place = 2 * (input.ndim - 1 - dim)
    before, after = pad[place : place + 2] if place < len(pad) else (0, 0)
    others = [*pad[:place], *(0,) * len(pad[place : place + 2]), *pad[place + 2 :]]
    shape = F.pad(torch.empty(input.shape, device="meta"), others, mode).shape
    if not before and not after:
        return by_shard(ctx, input, shape, F.pad, others, mode, value)
    if mode == "constant":
        if before < 0 or after < 0 or value:
            return NotImplemented
        if any(others):
            input = by_shard(ctx, input, shape, F.pad, others, mode, value)
        pieces = [SourceSlice(None, 0, before), SourceSlice(0, 0, input.shape[dim]), SourceSlice(None, 0, after)]
        return ctx.reshard([input], [[piece for piece in pieces if len(piece)]], dim)[0]
    length = input.shape[dim]
    if mode not in ("replicate", "reflect") or min(before, after) < 0 or is_differentiated(input):
        return NotImplemented
    if mode == "reflect" and max(before, after) >= length:
        return NotImplemented  # for which torch raises
    rows = range(-before, length + after)
    if mode == "replicate":
        picked = tuple(min(max(row, 0), length - 1) for row in rows)
    else:
        picked = tuple(length - 1 - abs(length - 1 - abs(row)) for row in rows)
    shape = torch.Size((*shape[:dim], len(picked), *shape[dim + 1 :]))
    return by_window(ctx, input, shape, Picked(picked), _pick, dim, picked, F.pad, (others, mode))


def _pick(
    rows: Tensor,
    made: range,
    start: int,
    dim: int,
    picked: tuple[int, ...],
    function: Callable[..., Tensor],
    options: Sequence[Any],
) -> Tensor:
    """Rows by their numbers, and then what a function makes of the other dims."""
    numbers = torch.tensor([row - start for row in picked[made.start : made.stop]], device=rows.device)
    return function(rows.index_select(dim, numbers), *options)


@HANDLERS.of(F.interpolate)
def _interpolate(
    ctx: ShardingContext,
    input: DTensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    """Resizing by the nearest pixel: each row is one of the input."""
    dim = sharded_dim(input)
    if dim is None or dim < 2 or mode not in ("nearest", "nearest-exact") or antialias or is_differentiated(input):
        return NotImplemented
    dims = input.ndim - 2
    sizes, factors = _of_each(size, dims), _of_each(scale_factor, dims)
    if (size is None) == (scale_factor is None) or len(sizes) != dims or len(factors) != dims:
        return NotImplemented
    rows = [
        _nearest(length, own, factor, mode, recompute_scale_factor)
        for length, own, factor in zip(input.shape[2:], sizes, factors, strict=True)
    ]
    for length, own in zip(input.shape[2:], rows, strict=True):
        if own != _nearest(length, len(own), None, mode, None):
            return NotImplemented  # a factor that torch does not round as it does the sizes
    shape = torch.Size((*input.shape[:2], *map(len, rows)))
    picked = rows[dim - 2]
    others = [None if place == dim - 2 else len(own) for place, own in enumerate(rows)]
    return by_window(ctx, input, shape, Picked(picked), _pick, dim, picked, _resize, (others, mode))


def _of_each(value: Any, dims: int) -> Sequence[Any]:
    """A number for each dim, of one for all or one each."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return [*numbers] * dims if len(numbers) == 1 else numbers


@lru_cache(maxsize=1024)
def _nearest(length: int, size: int | None, factor: float | None, mode: str, recompute: bool | None) -> tuple[int, ...]:
    """The rows that torch takes to resize `length` rows, by resizing their numbers."""
    numbers = torch.arange(length, dtype=torch.float64).view(1, 1, -1)
    rows = F.interpolate(numbers, size, factor, mode, recompute_scale_factor=recompute)
    return tuple(int(row) for row in rows.flatten().tolist())


def _resize(tensor: Tensor, sizes: Sequence[int | None], mode: str) -> Tensor:
    """Resize all dims after the channels but the one whose size is None."""
    full = [tensor.shape[dim] if size is None else size for dim, size in enumerate(sizes, start=2)]
    return tensor if full == list(tensor.shape[2:]) else F.interpolate(tensor, full, mode=mode)


@HANDLERS.of(F.pixel_shuffle)
def _pixel_shuffle(ctx: ShardingContext, input: DTensor, upscale_factor: int) -> Any:
    """Channels to pixels: a row makes `upscale_factor` rows."""
    dim, factor = sharded_dim(input), upscale_factor
    if dim != input.ndim - 2 or dim < 1 or is_differentiated(input) or factor < 1 or input.shape[-3] % factor**2:
        return NotImplemented
    *batch, channels, height, width = input.shape
    shape = torch.Size((*batch, channels // factor**2, height * factor, width * factor))
    return by_window(ctx, input, shape, Window(parts=factor), _shuffle, dim, factor)


def _shuffle(rows: Tensor, made: range, start: int, dim: int, factor: int) -> Tensor:
    return F.pixel_shuffle(rows, factor).narrow(dim, made.start - start * factor, len(made))


@HANDLERS.of(F.pixel_unshuffle)
def _pixel_unshuffle(ctx: ShardingContext, input: DTensor, downscale_factor: int) -> Any:
    """Pixels to channels: a row is made of `downscale_factor` rows."""
    dim, factor = sharded_dim(input), downscale_factor
    if dim != input.ndim - 2 or dim < 1 or is_differentiated(input) or factor < 1:
        return NotImplemented
    *batch, channels, height, width = input.shape
    if height % factor or width % factor:
        return NotImplemented
    shape = torch.Size((*batch, channels * factor**2, height // factor, width // factor))
    return by_window(ctx, input, shape, Window(factor, last=factor - 1), _unshuffle, factor)


def _unshuffle(rows: Tensor, made: range, start: int, factor: int) -> Tensor:
    return F.pixel_unshuffle(rows, factor)


def _register_pooling(function: Any, dims: int) -> None:
    @HANDLERS.of(function)
    def pooling(
        ctx: ShardingContext,
        input: DTensor,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        """Averages over windows that lie within the tensor."""
        dim = sharded_dim(input)
        if dim is None or input.ndim < dims + 1 or ceil_mode or divisor_override or is_differentiated(input):
            return NotImplemented
        kernels, strides = _of_each(kernel_size, dims), _of_each(kernel_size if stride is None else stride, dims)
        if any(_of_each(padding, dims)) or not len(kernels) == len(strides) == dims or min(strides) < 1:
            return NotImplemented
        sizes = [(n - size) // step + 1 for n, size, step in zip(input.shape[-dims:], kernels, strides, strict=True)]
        if min(sizes) < 1:
            return NotImplemented
        place = dim - (input.ndim - dims)
        shape = torch.Size((*input.shape[:-dims], *sizes))
        if place < 0:
            return by_shard(ctx, input, shape, function, kernels, strides)
        window = Window(strides[place], last=kernels[place] - 1)
        return by_window(ctx, input, shape, window, _pool, function, (kernels, strides))


def _pool(rows: Tensor, made: range, start: int, function: Callable[..., Tensor], options: Sequence[Any]) -> Tensor:
    return function(rows, *options)


for _dims, _function in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), start=1):
    _register_pooling(_function, _dims)
