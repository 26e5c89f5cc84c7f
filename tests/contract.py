"""The communication contract as numbers: what a run may send, to the call and to the byte."""

from __future__ import annotations

import math

from meshdiff import Layout, Request
from meshdiff.attention.exchange import chunk_sizes
from meshdiff.models.video_dit import VideoDiTConfig

FLOAT = 4  # bytes


def attention_bytes(batch: int, seq: int, heads: int, head_dim: int, ranks: int, rank: int) -> int:
    """What one rank sends for one self-attention, forward: qkv from its tokens, and the output from its heads."""
    tokens, own_heads = chunk_sizes(seq, ranks)[rank], chunk_sizes(heads, ranks)[rank]
    qkv = 3 * tokens * (heads - own_heads)
    out = own_heads * (seq - tokens)
    return batch * head_dim * FLOAT * (qkv + out)


def run_traffic(layout: Layout, config: VideoDiTConfig, request: Request, branches: int) -> dict:
    """The traffic of a whole run, of the rank that sends most in each collective."""
    seq = math.prod(
        size // patch for size, patch in zip((request.frames, request.height, request.width), config.patch, strict=True)
    )
    slots = -(-branches // layout.cfg)
    shard = chunk_sizes(seq, layout.cp)[0] * config.patch_dim * FLOAT
    traffic = {}
    if layout.cfg > 1:
        traffic["cfg"] = {
            "all_gather": {"count": request.steps, "bytes": request.steps * slots * shard * (layout.cfg - 1)}
        }
    if layout.cp > 1:
        layers = config.depth * request.steps
        ranks = range(layout.cp)
        traffic["cp"] = {
            # The only gather of the sequence: the finished clip, once.
            "all_gather": {"count": 1, "bytes": shard * (layout.cp - 1)},
            "all_to_all": {"count": 2 * layers, "bytes": 0},
        }
        tokens, heads = chunk_sizes(seq, layout.cp), chunk_sizes(config.heads, layout.cp)
        unit = slots * config.head_dim * FLOAT * layers
        # The two exchanges are counted apart, each by its busiest rank.
        qkv = max(3 * tokens[r] * (config.heads - heads[r]) for r in ranks)
        out = max(heads[r] * (seq - tokens[r]) for r in ranks)
        traffic["cp"]["all_to_all"]["bytes"] = unit * (qkv + out)
    return traffic
