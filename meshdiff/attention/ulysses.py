"""Ulysses: every rank sees the whole sequence for some of the heads.

Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509.

    query, key, value   [batch, seq/N, heads, head_dim]
      one all-to-all -> [batch, seq, heads/N, head_dim]     attention, nothing sent
      one all-to-all -> [batch, seq/N, heads, head_dim]

Each rank sends `4 * batch * seq * heads * head_dim * (N-1)/N^2` elements. Heads
that N does not divide are shared out unevenly: right, but the ranks with fewer
heads wait.
"""

from __future__ import annotations

from torch.distributed.tensor import DTensor

from meshdiff.attention.exchange import exchange
from meshdiff.attention.local import attend_locally
from meshdiff.placements import HEADS, SEQUENCE

__all__ = ["ulysses"]


def ulysses(query: DTensor, key: DTensor, value: DTensor) -> DTensor:
    """Self-attention of `[batch, seq, heads, head_dim]` placed `Shard(1)` on a 1-D mesh."""
    query, key, value = exchange([query, key, value], SEQUENCE, HEADS)
    attended = attend_locally(query, key, value)
    (attended,) = exchange([attended], HEADS, SEQUENCE)
    return attended
