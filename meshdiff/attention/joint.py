"""Attention over two sequences as one: text beside image tokens (FLUX, HunyuanVideo, SD3)."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.attention.local import scaled_dot_product_attention
from meshdiff.attention.masks import whole_mask
from meshdiff.attention.problem import Problem, chunk_ranges
from meshdiff.attention.strategy import AUTO, STRATEGIES, choose_strategy
from meshdiff.attention.validation import check_ranks, describe, is_placed, plain_mask, read
from meshdiff.distributed.caching import lru_cache_by_mesh
from meshdiff.distributed.local_shards import from_shard, to_shard
from meshdiff.distributed.placements import REPLICATED, SEQUENCE
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["attend_beside", "joint_attention"]

QKV = tuple[Tensor, Tensor, Tensor]
NAMES = ("query", "key", "value")


def joint_attention(
    image: QKV,
    text: QKV,
    *,
    text_first: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    strategy: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention of image and text tokens to each other and themselves, as to one sequence.

    Each rank takes its part of the text as it takes its part of the image, so
    every token is a query once and a key once, in whatever strategy. What that
    costs is `mesh_attention` of the longer sequence, and, for text that is
    replicated, one all-gather of its output, and of each of its gradients.

    Args:
        image: query, key and value `[batch, seq, heads, head_dim]`, placed `Shard(1)`.
        text: query, key and value `[batch, text, heads, head_dim]` on the same
            mesh, placed `Replicate()` or `Shard(1)`.
        text_first: True if text comes before image (as in FLUX), else it comes after
            (as in HunyuanVideo). It matters to a mask, to causality, and to the bits.
        attn_mask: as in `mesh_attention`, over all tokens in that order.
        is_causal, scale, strategy: as in `mesh_attention`.

    Returns:
        The attended image and text, each of the shape and placement of its query.

    Raises:
        ValueError: as `mesh_attention`.
    """
    named = {f"image {name}": tensor for name, tensor in zip(NAMES, image, strict=True)}
    named |= {f"text {name}": tensor for name, tensor in zip(NAMES, text, strict=True)}
    check_ranks({**named, "attn_mask": attn_mask}, strategy=strategy, is_causal=is_causal, scale=scale)

    def wrong(expected: str, fix: str = "") -> ValueError:
        return ValueError(f"joint attention takes {expected}; given {describe(**named)}{'; ' if fix else ''}{fix}")

    if image[0].shape[1] != image[1].shape[1] or text[0].shape[1] != text[1].shape[1]:
        raise wrong("query, key and value of one length, of image and of text")
    if image[0].shape[0::2] != text[0].shape[0::2] or image[1].shape[2] != text[1].shape[2]:
        raise wrong("image and text of one batch and one number of heads")
    parts = [text, image] if text_first else [image, text]
    if not any(isinstance(tensor, DTensor) for tensor in (*image, *text)):
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        read(query, key, value, is_causal=is_causal, scale=scale, strategy=strategy)
        mask = attn_mask if attn_mask is None else whole_mask(attn_mask, *_sizes(query, query.shape[1]))
        attended = scaled_dot_product_attention(query, key, value, mask, is_causal, scale)
        first, second = attended.split([part[0].shape[1] for part in parts], dim=1)
        return (second, first) if text_first else (first, second)
    of_image = read(*image, is_causal=is_causal, scale=scale)
    # Text that is whole poses the problem of its shards, as which it will be divided.
    query, key, value = (_divide(tensor) for tensor in text)
    of_text = read(query, key, value, is_causal=is_causal, scale=scale)
    if of_image is None or of_text is None or of_image.mesh != of_text.mesh:
        raise wrong("image and text as DTensors on one mesh")
    assert isinstance(text[0], DTensor)
    if not is_placed(image[1], SEQUENCE) or not is_placed(key, SEQUENCE):
        raise wrong(
            "image Shard(1), and text Shard(1) or Replicate(), in all of query, key and value",
            "use .redistribute(placements=[Shard(1)])",
        )
    if replace(of_image, queries=(), keys=()) != replace(of_text, queries=(), keys=()):
        raise wrong("image and text of one head_dim and one dtype")
    in_order = [(query, key, value), image] if text_first else [image, (query, key, value)]
    sizes, mesh = tuple(part[0].shape[1] for part in in_order), of_image.mesh
    attended = attend_beside(
        mesh,
        sizes,
        *(_beside(*map(to_shard, pair)) for pair in zip(*in_order, strict=True)),
        attn_mask=attn_mask if attn_mask is None else plain_mask(attn_mask),
        is_causal=is_causal,
        scale=scale,
        strategy=strategy,
    )
    first, second = _apart(sizes, mesh.size(), mesh.get_local_rank(), attended)
    of_text_tokens, of_image_tokens = (first, second) if text_first else (second, first)
    return (
        from_shard(of_image_tokens, mesh, SEQUENCE, like=image[0]),
        from_shard(of_text_tokens, mesh, SEQUENCE, like=query).redistribute(placements=text[0].placements),
    )


def attend_beside(
    mesh: DeviceMesh,
    sizes: tuple[int, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    strategy: str = AUTO,
) -> Tensor:
    """Attention over several sequences as one, of which each rank holds its part of each side by side.

    Args:
        mesh: 1-D.
        sizes: the length of each sequence, in their order.
        query, key, value: this rank's `[batch, own tokens, heads, head_dim]`, those of the first sequence first.
        attn_mask: the full mask, plain, over all tokens in the order of the sequence.
        is_causal, scale, strategy: as in `mesh_attention`.

    Returns:
        The shape of `query`.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    problem = _beside_problem(
        mesh, sizes, query.shape[0], heads, kv_heads, query.shape[3], query.dtype, is_causal, scale
    )
    mask = attn_mask if attn_mask is None else whole_mask(attn_mask, *_sizes(query, sum(sizes)))
    return STRATEGIES[choose_strategy(problem, strategy).strategy](problem, query, key, value, mask)


@lru_cache_by_mesh
def _beside_problem(
    mesh: DeviceMesh,
    sizes: tuple[int, ...],
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool,
    scale: float | None,
) -> Problem:
    starts = accumulate(sizes, initial=0)
    ranges = [chunk_ranges(size, mesh.size(), start) for size, start in zip(sizes, starts, strict=False)]
    tokens = tuple(zip(*ranges, strict=True))
    return Problem(mesh, batch, heads, kv_heads, head_dim, dtype, tokens, tokens, is_causal, scale)


def _sizes(query: Tensor, total: int) -> tuple[int, int, int, int]:
    return query.shape[0], query.shape[2], total, total


def _divide(tensor: Tensor) -> Tensor:
    """Replicated text as each rank's part of it; nothing is sent."""
    if isinstance(tensor, DTensor) and tensor.placements[0] == REPLICATED:
        return tensor.redistribute(placements=[SEQUENCE])
    return tensor


@on_each_rank
def _beside(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=1)


@on_each_rank
def _apart(sizes: tuple[int, ...], ranks: int, rank: int, attended: Tensor) -> tuple[Tensor, ...]:
    own = [len(chunk_ranges(size, ranks)[rank]) for size in sizes]
    return tuple(part.contiguous() for part in attended.split(own, dim=1))
