"""Attention over the mesh, and layers for which a rank needs nothing of others but DTensor has no way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from meshdiff.attention import mesh_attention
from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import as_replicated, is_sharded, own_copy, sharded_dim, swapped, to_plain
from meshdiff.autoshard.ops.concat import attention_of_joins
from meshdiff.autoshard.registry import Handlers, by_shard
from meshdiff.distributed.local_shards import contiguous_stride, to_shard, wrap
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["HANDLERS"]

HANDLERS = Handlers()


@HANDLERS.of(F.linear)
def _linear(ctx: ShardingContext, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """A linear layer on each rank's rows; DTensor flattens the dims before the last, see "linear of one row".

    Names in quotes are those of programs in tests/autoshard/test_dtensor_rules.py, see `op_traits`.
    """
    dim = sharded_dim(input)
    weights = [tensor for tensor in (weight, bias) if tensor is not None]
    if dim is None or dim == input.ndim - 1 or weight.ndim != 2 or any(map(is_sharded, weights)):
        return NotImplemented
    shape = torch.Size((*input.shape[:-1], weight.shape[0]))
    if ctx.recorder is not None:
        ctx.recorder.on_linear(shape, weight)
    return by_shard(ctx, input, shape, F.linear, *(own_copy(tensor, ctx.mesh) for tensor in weights))


@HANDLERS.of(F.layer_norm)
def _layer_norm(
    ctx: ShardingContext,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    return _normalized(ctx, F.layer_norm, input, normalized_shape, (weight, bias), eps)


@HANDLERS.of(F.rms_norm, torch.rms_norm)
def _rms_norm(
    ctx: ShardingContext,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    return _normalized(ctx, F.rms_norm, input, normalized_shape, (weight,), eps)


def _normalized(
    ctx: ShardingContext,
    func: Any,
    input: Tensor,
    shape: Sequence[int],
    weights: Sequence[Tensor | None],
    eps: float | None,
) -> Any:
    """Each row for itself; DTensor takes it apart into a dozen operations."""
    dim = sharded_dim(input)
    if not isinstance(shape, (tuple, list)) or any(map(is_sharded, weights)):
        return NotImplemented
    if dim is None or dim >= input.ndim - len(shape):
        return NotImplemented
    if ctx.recorder is not None:
        ctx.recorder.on_function(func.__name__)
    own = [None if tensor is None else own_copy(tensor, ctx.mesh) for tensor in weights]
    return by_shard(ctx, input, input.shape, func, shape, *own, eps)


@HANDLERS.of(Tensor.float, Tensor.type_as)
def _of_its_type(ctx: ShardingContext, tensor: Tensor, other: Tensor | None = None) -> Any:
    """The tensor itself, as torch returns it, if it has that dtype; models convert before every sum."""
    return tensor if tensor.dtype == (torch.float32 if other is None else other.dtype) else NotImplemented


@HANDLERS.of(F.dropout)
def _dropout(ctx: ShardingContext, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """The tensor itself, where nothing is dropped."""
    return NotImplemented if training else input


@HANDLERS.of(torch.view_as_complex)
def _view_as_complex(ctx: ShardingContext, input: DTensor) -> Any:
    """Pairs of each rank's rows as complex numbers, a view: see "write to complex numbers of one row"."""
    dim = sharded_dim(input)
    if dim is None or dim == input.ndim - 1 or input.is_complex() or input.shape[-1] != 2:
        return NotImplemented
    stride = tuple(step // 2 for step in input.stride()[:-1])
    result = by_shard(ctx, input, input.shape[:-1], torch.view_as_complex, stride=stride)
    ctx.viewed(input, result)
    return result


@HANDLERS.of(torch.view_as_real)
def _view_as_real(ctx: ShardingContext, input: DTensor) -> Any:
    if sharded_dim(input) is None or not input.is_complex():
        return NotImplemented
    stride = (*(2 * step for step in input.stride()), 1)
    result = by_shard(ctx, input, torch.Size((*input.shape, 2)), torch.view_as_real, stride=stride)
    ctx.viewed(input, result)
    return result


def _by_batch(
    ctx: ShardingContext, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **options: Any
) -> Any:
    """Attention within each entry of a sharded batch, or of sharded heads, with one mask for all: nothing is sent."""
    dim = sharded_dim(query)
    assert dim is not None
    if attn_mask is not None:
        if is_sharded(attn_mask) or (attn_mask.ndim >= query.ndim - dim and attn_mask.shape[dim - query.ndim] != 1):
            return NotImplemented
        attn_mask = own_copy(attn_mask, ctx.mesh)
    shapes = [tensor.shape[:-3] if options["enable_gqa"] else tensor.shape[:-2] for tensor in (query, key, value)]
    if shapes != shapes[:1] * 3 or not query.shape[dim] == key.shape[dim] == value.shape[dim]:
        return NotImplemented
    ctx.on_attention(query, key, True)
    with ctx.unguarded():
        local = _attend_each(to_shard(query), to_shard(key), to_shard(value), attn_mask, **options)
    shape = torch.Size((*query.shape[:-1], value.shape[-1]))
    return wrap(local, ctx.mesh, Shard(dim), shape, contiguous_stride(shape))


@on_each_rank
def _attend_each(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor:
    if not query.numel():
        return query.new_empty((*query.shape[:-1], value.shape[-1]))
    return F.scaled_dot_product_attention(query, key, value, attn_mask, **options).contiguous()


@HANDLERS.of(F.scaled_dot_product_attention)
def _attention(
    ctx: ShardingContext,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if query.ndim == key.ndim == value.ndim == 3 and attn_mask is None and not enable_gqa:
        ctx.materialize((query, key, value))
        one_head = (tensor.unsqueeze(1) for tensor in (query, key, value))
        attended = _attention(ctx, *one_head, None, dropout_p, is_causal, scale)
        return attended if attended is NotImplemented else attended.squeeze(1)
    alike = query.ndim == key.ndim == value.ndim == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
    # Without enable_gqa a single head of key and value is for all heads, as ever in broadcasting.
    grouped = alike and (query.shape[1] == key.shape[1] or key.shape[1] == 1 or enable_gqa)
    other_mask = attn_mask is not None and (attn_mask.requires_grad or attn_mask.dtype not in (torch.bool, query.dtype))
    if ctx.lazy and alike and grouped and not other_mask and not dropout_p:
        joined = attention_of_joins(ctx, query, key, value, attn_mask, is_causal, scale)
        if joined is not NotImplemented:
            return joined
    ctx.materialize((query, key, value, attn_mask))
    dims = [sharded_dim(tensor) for tensor in (query, key, value)]
    seq = query.ndim - 2
    if not dropout_p and not other_mask and len(set(dims)) == 1 and dims[0] is not None and dims[0] < seq:
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _by_batch(ctx, query, key, value, attn_mask, **options)
    if dropout_p or not alike or not grouped or other_mask or set(dims) - {seq, None} or not set(dims) - {None}:
        ctx.on_attention(query, key, False)
        return NotImplemented
    query, key, value = (as_replicated(tensor, ctx.mesh) for tensor in (query, key, value))
    cross = dims[1] is None and dims[2] is None
    placed = [Shard(seq)] * 3 if not cross else [Shard(seq), key.placements[0], key.placements[0]]
    if isinstance(attn_mask, DTensor):
        attn_mask = to_plain(attn_mask)
    ctx.on_attention(query, key, True)
    with ctx.unguarded():
        rows = [
            swapped(tensor if tensor.placements[0] == to else tensor.redistribute(placements=[to]))
            for tensor, to in zip((query, key, value), placed, strict=True)
        ]
        attended = mesh_attention(*rows, attn_mask=attn_mask, is_causal=is_causal, scale=scale, strategy=ctx.strategy)
        return swapped(attended)
