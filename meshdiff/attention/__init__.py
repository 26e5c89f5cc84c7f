"""Attention over a mesh: DTensors in, DTensors out, and nothing gathered unasked.

What each rank of N sends and holds, in elements, for B = batch, S = seq, H = heads,
K = kv_heads, d = head_dim, where N divides them (`tests/support/contract.py` has the exact
numbers for any size, which the tests hold against what was really sent):

========  ==========================  ================================  ====================  =================
strategy  sends, forward              sends, backward                   holds besides q, k, v  limits
========  ==========================  ================================  ====================  =================
ulysses   (2H + 2K) BSd (N-1)/N^2     the same                          q, k, v of H/N heads  best if N divides H
          in 2 all-to-alls            in 2 all-to-alls                                        and K
ring      2K BSd (N-1)/N              2K BSd (N-1)/N, and 2K BSd        2 blocks of K/V       no second gradient
          in N-1 steps                of gradients in N steps
hybrid    ulysses within groups of u, ring between the N/u groups       q, k, v of H/u heads  1 < u < N needed
gather    2K BSd (N-1)/N              2K BSd (N-1)/N                    K/V of all tokens     memory
          in 1 all-gather             in 1 all-to-all
local     nothing                     nothing; the gradients of key     nothing               key and value
                                      and value are `Partial`                                 `Replicate()`
========  ==========================  ================================  ====================  =================
"""

from __future__ import annotations

from meshdiff.attention.joint import joint_attention
from meshdiff.attention.mesh_attention import MeshAttention, explain_strategy, mesh_attention
from meshdiff.attention.parallel_style import ContextParallel
from meshdiff.attention.sdpa_mode import sharded_attention
from meshdiff.attention.strategy import Choice

__all__ = [
    "Choice",
    "ContextParallel",
    "MeshAttention",
    "explain_strategy",
    "joint_attention",
    "mesh_attention",
    "sharded_attention",
]
