"""The communication contract as numbers: what a run may send, to the call and to the byte."""

from __future__ import annotations

import math
from collections import Counter
from copy import deepcopy

from meshdiff import Layout, Request
from meshdiff.attention.problem import chunk_sizes
from meshdiff.models.wan import WanConfig

FLOAT = 4  # bytes

Sent = Counter[tuple[str, str]]  # by (collective, "count" or "bytes")


def sent(collective: str, count: int, nbytes: int) -> Sent:
    return Counter({(collective, "count"): count, (collective, "bytes"): nbytes}) if count else Counter()


def needed_heads(heads: int, kv_heads: int, ranks: int) -> list[int]:
    """How many heads of key and value each rank needs for its query heads."""
    group, start, needed = heads // kv_heads, 0, []
    for own in chunk_sizes(heads, ranks):
        needed.append(len({head // group for head in range(start, start + own)}))
        start += own
    return needed


def exchange_bytes(tokens: list[int], heads: list[int], total_heads: int, rank: int) -> tuple[int, int]:
    """Tokens x heads that a rank sends in the exchange to heads, and in the one back."""
    to_heads = tokens[rank] * (total_heads - heads[rank])
    return to_heads, heads[rank] * (sum(tokens) - tokens[rank])


def ulysses(
    queries: list[int], keys: list[int], heads: int, kv_heads: int, rank: int, together: bool
) -> tuple[list[int], list[int]]:
    """Tokens x heads sent in each call, forward and backward; query, key and value `together` if alike on all ranks."""
    ranks = len(queries)
    own, needed = chunk_sizes(heads, ranks), needed_heads(heads, kv_heads, ranks)
    query, out = exchange_bytes(queries, own, heads, rank)
    key, of_key = (2 * n for n in exchange_bytes(keys, needed, sum(needed), rank))
    if together:
        return [query + key, out], [query, out + of_key]
    return [query, key, out], [query, out, of_key]


def ring(keys: list[int], kv_heads: int, rank: int, gradient: float) -> tuple[list[int], list[int]]:
    """The same; a gradient of a block is `gradient` times as wide as the block."""
    ranks = len(keys)
    held = [2 * kv_heads * keys[(rank - step) % ranks] for step in range(ranks)]
    return held[:-1], held[:-1] + [int(gradient * size) for size in held]


def attention(
    strategy: str,
    shape: tuple[int, int, int, int, int, int],
    ranks: int,
    rank: int,
    itemsize: int = FLOAT,
) -> tuple[Sent, Sent]:
    """What one rank sends in an attention of `Case.shape`, forward and backward."""
    batch, queries, keys, heads, kv_heads, head_dim = shape
    unit = batch * head_dim * itemsize
    q, k = chunk_sizes(queries, ranks), chunk_sizes(keys, ranks)
    wide = FLOAT / itemsize  # gradients of half precision are summed in float32
    if ranks == 1:
        return Counter(), Counter()
    if strategy == "gather":
        forward = sent("all_gather", 1, unit * max(k) * 2 * kv_heads * (ranks - 1))
        return forward, sent("all_to_all", 1, int(unit * wide) * 2 * kv_heads * (keys - k[rank]))
    if strategy == "ring":
        calls = ring(k, kv_heads, rank, wide)
    elif strategy == "ulysses":
        calls = ulysses(q, k, heads, kv_heads, rank, together=q == k)
    elif strategy == "hybrid":
        u = max(
            size
            for size in range(1, ranks)
            if ranks % size == heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
        )
        group, member = divmod(rank, u)
        own = slice(group * u, (group + 1) * u)
        blocks = [sum(k[i : i + u]) for i in range(0, ranks, u)]
        within = ulysses(q[own], k[own], heads, kv_heads, member, together=q == k)
        around = ring(blocks, max(1, kv_heads // u), group, wide)
        calls = (within[0] + around[0], within[1] + around[1])
    else:
        raise ValueError(f"the contract does not say what {strategy} sends")
    forward, backward = (sent("all_to_all", len(sizes), unit * sum(sizes)) for sizes in calls)
    return forward, backward


def of_busiest(strategy: str, shape: tuple[int, int, int, int, int, int], ranks: int) -> Sent:
    """What a simulation counts of an attention, forward: each call by the rank that sends most in it."""
    if strategy == "gather":
        return attention(strategy, shape, ranks, 0)[0]
    batch, queries, keys, heads, kv_heads, head_dim = shape
    q, k = chunk_sizes(queries, ranks), chunk_sizes(keys, ranks)
    if strategy == "ring":
        calls = [ring(k, kv_heads, rank, 1)[0] for rank in range(ranks)]
    elif strategy == "ulysses":
        calls = [ulysses(q, k, heads, kv_heads, rank, together=q == k)[0] for rank in range(ranks)]
    else:
        raise ValueError(f"the contract does not say what a simulation counts of {strategy}")
    most = [max(sizes) for sizes in zip(*calls, strict=True)]
    return sent("all_to_all", len(most), batch * head_dim * FLOAT * sum(most))


def attention_bytes(batch: int, seq: int, heads: int, head_dim: int, ranks: int, rank: int) -> int:
    """What one rank sends for one self-attention by ulysses, forward."""
    forward, _ = attention("ulysses", (batch, seq, seq, heads, heads, head_dim), ranks, rank)
    return forward["all_to_all", "bytes"]


def run_traffic(
    layout: Layout,
    config: WanConfig,
    request: Request,
    branches: int,
    seq: int | None = None,
    strategy: str = "ulysses",
) -> dict[str, dict[str, dict[str, int]]]:
    """The traffic of a whole run, of the rank that sends most in each collective; of `seq` tokens, or of pixels."""
    if seq is None:
        sizes = (request.frames, request.height, request.width)
        seq = math.prod(size // patch for size, patch in zip(sizes, config.patch, strict=True))
    slots = -(-branches // layout.cfg)
    shard = chunk_sizes(seq, layout.cp)[0] * config.patch_dim * FLOAT
    traffic: dict[str, dict[str, dict[str, int]]] = {}
    if layout.cfg > 1:
        traffic["cfg"] = {
            "all_gather": {"count": request.steps, "bytes": request.steps * slots * shard * (layout.cfg - 1)}
        }
    if layout.cp > 1:
        # The only gather of the sequence: the finished clip, once.
        total = sent("all_gather", 1, shard * (layout.cp - 1))
        one = of_busiest(strategy, (slots, seq, seq, config.heads, config.heads, config.head_dim), layout.cp)
        for key, number in one.items():
            total[key] += number * config.depth * request.steps
        traffic["cp"] = {}
        for (collective, kind), number in total.items():
            traffic["cp"].setdefault(collective, {})[kind] = number
    return traffic


def of_rank(traffic: dict, layout: Layout, config: WanConfig, seq: int, steps: int, batch: int, rank: int) -> dict:
    """What one real rank sends of the traffic of a run: exchanges and gathers of guidance depend on its own shard."""
    traffic, place = deepcopy(traffic), rank % layout.cp
    if layout.cp > 1:
        own = attention_bytes(batch, seq, config.heads, config.head_dim, layout.cp, place)
        traffic["cp"]["all_to_all"]["bytes"] = own * config.depth * steps
    if layout.cfg > 1:
        missing = chunk_sizes(seq, layout.cp)[0] - chunk_sizes(seq, layout.cp)[place]
        traffic["cfg"]["all_gather"]["bytes"] -= steps * batch * missing * config.patch_dim * FLOAT * (layout.cfg - 1)
    return traffic
