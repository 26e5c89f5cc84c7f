"""Masks: the parts of a mask, and of the causal rule, that a rank needs."""

from __future__ import annotations

import torch
from torch import Tensor

from meshdiff.attention.problem import Tokens

__all__ = ["causal", "part", "whole_mask"]


def whole_mask(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """`mask` as `[batch or 1, heads or 1, queries or 1, keys or 1]`.

    Read as `torch.nn.functional.scaled_dot_product_attention` reads it: the last
    two dims are queries and keys, the ones before are heads and batch.

    Raises:
        ValueError: if its shape or dtype fits no such reading.
    """
    sizes = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
    fits = f"attn_mask needs a shape that broadcasts to [batch {batch}, heads {heads}, queries {queries}, keys {keys}]"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask is bool (True: may be seen) or floating point (added), not {mask.dtype}")
    if mask.ndim < 2 and mask.numel() != keys:
        raise ValueError(f"{fits}; given {list(mask.shape)}")
    if mask.shape == (batch, keys) and batch not in (1, queries):
        raise ValueError(f"{fits}; given [batch, keys] {list(mask.shape)}; pass attn_mask[:, None, None, :]")
    if mask.ndim > 4:
        raise ValueError(f"{fits}; given {list(mask.shape)}")
    full = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    for (name, size), given in zip(sizes.items(), full.shape, strict=True):
        if given not in (1, size):
            whole = "; the whole mask is wanted, the same on every rank" if name in ("queries", "keys") else ""
            raise ValueError(f"{fits}; given {list(mask.shape)}, with {given} {name}{whole}")
    return full


def part(mask: Tensor, heads: range | None, queries: Tokens | None, keys: Tokens | None) -> Tensor:
    """The entries of a full 4-D mask for some heads, queries and keys; None for all."""
    if heads is not None and mask.shape[1] > 1:
        mask = mask[:, heads.start : heads.stop]
    for dim, tokens in ((2, queries), (3, keys)):
        if tokens is not None and mask.shape[dim] > 1:
            pieces = [mask.narrow(dim, own.start, len(own)) for own in tokens]
            mask = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
    return mask


def causal(queries: Tokens, keys: Tokens, device: torch.device) -> Tensor | bool:
    """The mask of `keys` that each of `queries` may see when it sees none after itself.

    Returns:
        True or False where that is all or none of them, else a bool
        `[1, 1, queries, keys]`.
    """
    queries, keys = tuple(filter(len, queries)), tuple(filter(len, keys))
    if not queries or not keys or max(k[-1] for k in keys) <= min(q[0] for q in queries):
        return True
    if min(k[0] for k in keys) > max(q[-1] for q in queries):
        return False
    # int32: in code compiled for a CPU, masks made of int64 and float32 do not mix.
    rows, columns = (
        torch.cat([torch.arange(own.start, own.stop, dtype=torch.int32, device=device) for own in tokens])
        for tokens in (queries, keys)
    )
    return (rows[:, None] >= columns)[None, None]
