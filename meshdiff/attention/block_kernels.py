"""One block of keys and values at a time: attention with its log-sum-exp, its merge, its gradients.

Tensors here are laid out as torch's kernels want them, `[batch, heads, seq, head_dim]`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["accumulator", "attend_block", "attend_block_backward", "merge", "wide"]

aten = torch.ops.aten


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a block's output and gradients: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which outputs are merged: in that of float32 itself, merges lose as much as the kernel does."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def attend_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of `query` to one block alone, and the log of its softmax's denominator.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim]`.
        mask: bool or additive, broadcastable to `[batch, heads, queries, keys]`.

    Returns:
        `[batch, heads, queries, head_dim]` and `[batch, heads, queries]`, both of
        the `wide` dtype. A query that sees no key has zeros and -inf.
    """
    key, value = _for_each_query_head(query, key, value)
    kernel = _kernel(query, mask)
    bias = _bias(mask, query.dtype if kernel == "cuda_flash" else wide(query.dtype))
    if kernel == "cpu_flash":
        query, key, value = (t.to(wide(t.dtype)) for t in (query, key, value))
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias, scale=scale)
        # The kernel says 0 of a query that sees nothing.
        return output, lse if bias is None else lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
    if kernel == "cuda_flash":
        output, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return output.to(wide(query.dtype)), lse
    scores = _scores(query, key, bias, scale)
    lse = scores.logsumexp(-1)
    return (scores - _finite(lse)[..., None]).exp() @ value.to(scores.dtype), lse


def attend_block_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients, given the output and log-sum-exp of all blocks.

    Returns:
        Gradients of query, key and value, of the `wide` dtype.
    """
    kv_heads, dtype = key.shape[1], wide(query.dtype)
    key, value = _for_each_query_head(query, key, value)
    kernel = _kernel(query, mask)
    bias, lse = _bias(mask, dtype), _finite(lse)
    if kernel == "cpu_flash":
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.to(dtype) for t in (gradient, query, key, value, output)), lse, 0.0, False, attn_mask=bias, scale=scale
        )
    elif kernel == "cuda_flash":
        gradients = _cuda_flash_backward(gradient, query, key, value, output, lse, scale)
    else:
        query, key, value, gradient = (t.to(dtype) for t in (query, key, value, gradient))
        weights = (_scores(query, key, bias, scale) - lse[..., None]).exp()
        of_scores = weights * (gradient @ value.mT - (gradient * output).sum(-1, keepdim=True)) * _scale(query, scale)
        gradients = of_scores @ key, of_scores.mT @ query, weights.mT @ gradient
    of_query, of_key, of_value = (t.to(dtype) for t in gradients)
    return of_query, _of_each_key_head(of_key, kv_heads), _of_each_key_head(of_value, kv_heads)


def merge(output: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from the attention to each, in the dtype of `output`."""
    block, block_lse = block.to(output.dtype), block_lse.to(lse.dtype)
    total = torch.logaddexp(lse, block_lse)
    # Where neither saw anything the weights are exp(-inf - 0): zero, and not -inf - -inf.
    base = _finite(total)
    return output * (lse - base).exp()[..., None] + block * (block_lse - base).exp()[..., None], total


def _kernel(query: Tensor, mask: Tensor | None) -> str:
    """The fastest way to compute a block that gives its log-sum-exp."""
    if query.device.type == "cpu":
        return "cpu_flash"
    if query.is_cuda and mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0:
        return "cuda_flash"
    return "explicit"


def _cuda_flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    no_dropout: Any = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return aten._scaled_dot_product_flash_attention_backward(
        gradient.to(query.dtype),
        query,
        key,
        value,
        output.to(query.dtype),
        lse,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        False,
        no_dropout,
        no_dropout[0],
        scale=scale,
    )


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    dtype = wide(query.dtype)
    scores = query.to(dtype) @ key.to(dtype).mT * _scale(query, scale)
    return scores if bias is None else scores + bias


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, 0)


def _for_each_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    return (key, value) if group == 1 else (key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))


def _of_each_key_head(gradient: Tensor, kv_heads: int) -> Tensor:
    return gradient if gradient.shape[1] == kv_heads else gradient.unflatten(1, (kv_heads, -1)).sum(2)
