"""The one function, and the module, that a model calls."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshdiff.attention.local import attend_rows, scaled_dot_product_attention
from meshdiff.attention.masks import whole_mask
from meshdiff.attention.strategy import AUTO, STRATEGIES, Choice, choose_strategy
from meshdiff.attention.validation import check_ranks, describe, placement, plain_mask, read
from meshdiff.distributed.local_shards import from_shard, to_shard
from meshdiff.distributed.placements import REPLICATED, SEQUENCE

__all__ = ["MeshAttention", "explain_strategy", "mesh_attention"]


def mesh_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    strategy: str = AUTO,
) -> Tensor:
    """Attention of `[batch, seq, heads, head_dim]`, on one device or over a mesh.

    Plain tensors are attended to on this device. DTensors on a 1-D mesh are
    attended to by their placements:

    - all three `Shard(1)`: every token sees the tokens of all ranks, by one of
      the strategies that `meshdiff.attention` describes.
    - query `Shard(1)`, key and value `Replicate()`: cross-attention, nothing sent.

    Differentiable, for any lengths and head counts, whether the ranks divide
    them or not. On a CPU in float32 `ulysses` gives the bits of one device, but for
    gradients of heads of key and value that several ranks share.

    Args:
        query: `[batch, queries, heads, head_dim]`, float32, bfloat16 or float16.
        key, value: `[batch, keys, kv_heads, head_dim]` of the same dtype;
            `kv_heads` divides `heads` (grouped-query attention).
        attn_mask: bool (True: may be seen) or floating point (added to the
            logits), broadcastable to `[batch, heads, queries, keys]`. The full
            mask, plain and the same on every rank, or a replicated DTensor. Over a
            mesh it gets no gradient.
        is_causal: query i sees keys 0 to i only.
        scale: of the logits; `head_dim ** -0.5` by default.
        strategy: "auto", "ulysses", "ring", "gather" or "hybrid".

    Returns:
        The shape, dtype and placement of `query`.

    Raises:
        ValueError: for anything else, with what was given and the call that fixes it.
    """
    check_ranks(
        {"query": query, "key": key, "value": value, "attn_mask": attn_mask},
        strategy=strategy,
        is_causal=is_causal,
        scale=scale,
    )
    if not any(isinstance(tensor, DTensor) for tensor in (query, key, value)):
        read(query, key, value, is_causal=is_causal, scale=scale, strategy=strategy)
        mask = attn_mask if attn_mask is None else whole_mask(attn_mask, *_mask_sizes(query, key))
        return scaled_dot_product_attention(query, key, value, mask, is_causal, scale)
    problem = read(query, key, value, is_causal, scale, strategy)
    assert problem is not None
    mask = attn_mask if attn_mask is None else whole_mask(plain_mask(attn_mask), *_mask_sizes(query, key))
    own_query, own_key, own_value = (to_shard(tensor) for tensor in (query, key, value))
    if placement(key) == REPLICATED:
        attended = attend_rows(problem, problem.mesh.get_local_rank(), own_query, own_key, own_value, mask)
    else:
        attend = STRATEGIES[choose_strategy(problem, strategy).strategy]
        attended = attend(problem, own_query, own_key, own_value, mask)
    return from_shard(attended, problem.mesh, SEQUENCE, like=query)


def explain_strategy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    strategy: str = AUTO,
) -> Choice:
    """The strategy that `mesh_attention` takes for these DTensors, and the reason; nothing is computed.

    >>> explain_strategy(query, key, value)  # 12 heads on 8 ranks
    Choice(strategy='hybrid', reason='12 heads (12 of key and value) on 8 ranks are 4 x 2: ulysses x ring')
    """
    problem = read(query, key, value, is_causal, None, strategy)
    if problem is None:
        raise ValueError(f"explain_strategy takes DTensors; given {describe(query=query, key=key, value=value)}")
    if placement(key) == REPLICATED:
        return Choice("local", "every rank holds all keys and values")
    return choose_strategy(problem, strategy)


class MeshAttention(nn.Module):
    """`mesh_attention` as a module, for a model to hold: hooks, `named_modules` and `torch.compile` see it.

    It has no parameters. Args: see `mesh_attention`.

    Example:
        >>> attention = MeshAttention(strategy="ring")
        >>> attention(query, key, value)  # [batch, seq, heads, head_dim]
    """

    def __init__(self, *, is_causal: bool = False, scale: float | None = None, strategy: str = AUTO) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.scale = scale
        self.strategy = strategy

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """See `mesh_attention`."""
        return mesh_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=self.is_causal,
            scale=self.scale,
            strategy=self.strategy,
        )

    def extra_repr(self) -> str:
        return f"strategy={self.strategy!r}, is_causal={self.is_causal}, scale={self.scale}"


def _mask_sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    return query.shape[0], query.shape[2], query.shape[1], key.shape[1]
