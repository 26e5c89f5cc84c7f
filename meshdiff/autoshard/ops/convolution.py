"""Convolutions of rows and their halo, see `halo`; with gradients they run on replicated tensors.

Layouts are torch's, `[batch, channels, (frames,) height, width]`, and one of the dims after the channels is sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import is_differentiated, is_sharded, own_copy, sharded_dim
from meshdiff.autoshard.halo import Window, by_window
from meshdiff.autoshard.registry import Handlers

__all__ = ["HANDLERS"]

HANDLERS = Handlers()

Sizes = int | Sequence[int]


def _of_each(value: Sizes, dims: int) -> list[int]:
    """A number for each dim, of one for all or one each."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _instead(values: Sequence[int], place: int, value: int) -> list[int]:
    return [*values[:place], value, *values[place + 1 :]]


def _place(input: Tensor, dims: int) -> int | None:
    """The place of the sharded dim among the last `dims`, before which there are channels; None if it is none of them.

    A tensor without a batch dim has one dim less.
    """
    dim = sharded_dim(input)
    if dim is None or input.ndim not in (dims + 1, dims + 2) or dim < input.ndim - dims:
        return None
    return dim - (input.ndim - dims)


def _register_convolution(function: Any, dims: int) -> None:
    @HANDLERS.of(function)
    def convolution(
        ctx: ShardingContext,
        input: DTensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> Any:
        """A convolution of each rank's rows and their halo; zeros of a padding before it that waits are not moved."""
        place = _place(input, dims)
        if place is None or is_differentiated(input, weight, bias) or any(map(is_sharded, (weight, bias))):
            return NotImplemented
        strides, dilations = _of_each(stride, dims), _of_each(dilation, dims)
        reach = [apart * (size - 1) for apart, size in zip(dilations, weight.shape[2:], strict=True)]
        if isinstance(padding, str):
            if padding not in ("same", "valid") or (padding == "same" and max(strides) > 1):
                return NotImplemented  # for which torch raises
            if padding == "same" and any(size % 2 for size in reach):
                return NotImplemented  # it has one more row after than before
            padding = [size // 2 if padding == "same" else 0 for size in reach]
        paddings = _of_each(padding, dims)
        sizes = [
            (size + 2 * own - far - 1) // step + 1
            for size, own, far, step in zip(input.shape[-dims:], paddings, reach, strides, strict=True)
        ]
        if min(sizes) < 1:
            return NotImplemented  # for which torch raises
        source, before = ctx.padded(input)
        first = -paddings[place] - before
        shape = torch.Size((*input.shape[: -dims - 1], weight.shape[0], *sizes))
        if ctx.recorder is not None:
            ctx.recorder.on_function("convolution", 2 * shape.numel() * weight[0].numel())
        options = (strides, _instead(paddings, place, 0), dilations, groups)
        own = [None if tensor is None else own_copy(tensor, ctx.mesh) for tensor in (weight, bias)]
        window = Window(strides[place], first=first, last=first + reach[place])
        return by_window(ctx, source, shape, window, _convolve, function, options, *own)


def _convolve(rows: Tensor, made: range, start: int, function: Any, options: Any, *weights: Tensor | None) -> Tensor:
    return function(rows, *weights, *options)  # type: ignore[no-any-return]  # of torch


def _register_transposed(function: Any, dims: int) -> None:
    @HANDLERS.of(function)
    def transposed(
        ctx: ShardingContext,
        input: DTensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> Any:
        """A transposed convolution: row `i` of the input goes to rows `i * stride - padding` and following ones."""
        place = _place(input, dims)
        if place is None or is_differentiated(input, weight, bias) or any(map(is_sharded, (weight, bias))):
            return NotImplemented
        strides, paddings = _of_each(stride, dims), _of_each(padding, dims)
        more, dilations = _of_each(output_padding, dims), _of_each(dilation, dims)
        reach = [apart * (size - 1) for apart, size in zip(dilations, weight.shape[2:], strict=True)]
        sizes = [
            (size - 1) * step - 2 * own + far + extra + 1
            for size, step, own, far, extra in zip(input.shape[-dims:], strides, paddings, reach, more, strict=True)
        ]
        if min(sizes) < 1 or any(extra >= max(two) for extra, *two in zip(more, strides, dilations, strict=True)):
            return NotImplemented  # for which torch raises
        shape = torch.Size((*input.shape[: -dims - 1], weight.shape[1] * groups, *sizes))
        if ctx.recorder is not None:
            ctx.recorder.on_function("convolution", 2 * input.numel() * weight[0].numel())
        options = (strides, _instead(paddings, place, 0), _instead(more, place, 0), groups, dilations)
        own = [None if tensor is None else own_copy(tensor, ctx.mesh) for tensor in (weight, bias)]
        step, padded = strides[place], paddings[place]
        # A row makes rows 0 to `reach` beyond its own; where that leaves gaps, what begins or ends in one takes the row
        # before it or after it as well.
        beyond = reach[place] - (step - 1)
        window = Window(1, step, first=padded - max(0, beyond), last=padded + max(0, -beyond))
        dim = sharded_dim(input)
        return by_window(ctx, input, shape, window, _transpose, function, options, dim, step, padded, *own)


def _transpose(
    rows: Tensor,
    made: range,
    start: int,
    function: Any,
    options: Any,
    dim: int,
    step: int,
    padded: int,
    *weights: Tensor | None,
) -> Tensor:
    output: Tensor = function(rows, *weights, *options)
    return output.narrow(dim, made.start - (start * step - padded), len(made))


for _dims, _name in enumerate(("1d", "2d", "3d"), start=1):
    _register_convolution(getattr(F, f"conv{_name}"), _dims)
    _register_transposed(getattr(F, f"conv_transpose{_name}"), _dims)
