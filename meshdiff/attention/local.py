"""Attention that needs nothing from other ranks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from meshdiff.attention.masks import causal, part
from meshdiff.attention.problem import Problem, Tokens, count
from meshdiff.distributed.simulation import on_each_rank

__all__ = [
    "attend_rows",
    "both",
    "in_order",
    "is_in_order",
    "out_of_order",
    "scaled_dot_product_attention",
]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of plain tensors `[batch, seq, heads, head_dim]`, by torch's own kernels.

    Key and value may have fewer heads, by an integer factor.
    """
    if query.numel() == 0 or key.numel() == 0:
        # A rank without tokens or heads: torch's CPU kernel divides by their number. The sums
        # are there for the gradients, which are zero but have to arrive.
        return query * 0 + key.sum() + value.sum()
    if attn_mask is not None and is_causal:  # torch takes one of them
        attn_mask = both(attn_mask, causal((range(query.shape[1]),), (range(key.shape[1]),), query.device))
        is_causal = False
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32):
        attn_mask = attn_mask.to(query.dtype)
    seq = query.shape[1]
    if query.device.type == "cpu" and seq != key.shape[1]:
        # The CPU kernel takes queries in blocks, and a last block of fewer than 4 rows goes to a matrix
        # product that adds up in another order: the result of a shard would depend on its length.
        missing = -seq % 4
        query = F.pad(query, (0, 0, 0, 0, 0, missing))
        if attn_mask is not None and attn_mask.shape[-2] > 1:
            attn_mask = F.pad(attn_mask, (0, 0, 0, missing), value=True)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return attended.transpose(1, 2)[:, :seq].contiguous()


@on_each_rank
def attend_rows(
    problem: Problem, rank: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention of a rank's own queries to all keys, which it holds in their order.

    Args:
        query: `[batch, own seq, heads, head_dim]`.
        key, value: `[batch, seq, kv_heads, head_dim]`.
        mask: the full mask, see `masks.whole_mask`.
    """
    queries, keys = problem.queries[rank], range(sum(map(count, problem.keys)))
    rows = None if mask is None else part(mask, None, queries, None)
    if not problem.is_causal or queries == (range(count(queries)),):
        return scaled_dot_product_attention(query, key, value, rows, problem.is_causal, problem.scale)
    seen = causal(queries, (keys,), query.device)
    return scaled_dot_product_attention(query, key, value, both(rows, seen), scale=problem.scale)


def both(mask: Tensor | None, seen: Tensor | bool) -> Tensor | None:
    """The mask of what a mask and causality both allow; None for no limit."""
    if isinstance(seen, bool):
        return mask
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


def is_in_order(tokens: Iterable[range]) -> bool:
    """True if positions increase."""
    return all(one.stop <= other.start for one, other in pairwise(filter(len, tokens)))


def in_order(tensor: Tensor, tokens: Tokens) -> Tensor:
    """`[batch, seq, ...]` held in the order `tokens`, in the order of the sequence."""
    if is_in_order(tokens):
        return tensor
    pieces = tensor.split([len(own) for own in tokens], dim=1)
    return torch.cat([pieces[i] for i in sorted(range(len(tokens)), key=lambda i: tokens[i].start)], dim=1)


def out_of_order(tensor: Tensor, tokens: Tokens) -> Tensor:
    """`[batch, seq, ...]` in the order of the sequence, in the order `tokens`."""
    if is_in_order(tokens):
        return tensor
    return torch.cat([tensor[:, own.start : own.stop] for own in tokens], dim=1)
