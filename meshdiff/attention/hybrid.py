"""Hybrid: Ulysses between neighbours, a ring between groups of them.

Fang and Zhao, "USP: A Unified Sequence Parallelism Approach for Long Context
Generative AI", arXiv:2405.07719. With 12 heads on 8 ranks, the heads are
divided within groups of 4, and 2 groups form a ring:

    rank      0 1 2 3   4 5 6 7
    ulysses  |-------| |-------|      all-to-all
    ring      0 - 4, 1 - 5, 2 - 6, 3 - 7
"""

from __future__ import annotations

from torch import Tensor

from meshdiff.attention.masks import part
from meshdiff.attention.problem import Problem, count
from meshdiff.attention.ring import ring
from meshdiff.attention.seq_head_exchange import Exchange, heads_to_sequence, sequence_to_heads
from meshdiff.distributed.mesh import ring_of_groups
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["hybrid", "members"]


def members(heads: int, kv_heads: int, ranks: int) -> int:
    """The largest number of neighbours, of that many ranks, that the heads divide between evenly."""
    return max(
        size
        for size in range(1, ranks + 1)
        if ranks % size == 0 and heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    )


def hybrid(problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """A `meshdiff.attention.strategy.Strategy`, which says what it takes and returns."""
    size = members(problem.heads, problem.kv_heads, problem.ranks)
    groups = ring_of_groups(problem.mesh, size)
    around, within = groups["ring"], groups["ulysses"]
    heads, key_heads = problem.query_heads(size), problem.key_heads(size)
    group, member = around.get_local_rank(), within.get_local_rank()
    queries, keys = (
        tuple(tuple(count(tokens[i + j]) for j in range(size)) for i in range(0, problem.ranks, size))
        for tokens in (problem.queries, problem.keys)
    )
    if queries == keys:
        together = Exchange(within, queries, (heads, key_heads, key_heads), group)
        query, key, value = sequence_to_heads(together, query, key, value)
    else:
        (query,) = sequence_to_heads(Exchange(within, queries, (heads,), group), query)
        key, value = sequence_to_heads(
            Exchange(within, keys, (key_heads, key_heads), group, of_queries=False), key, value
        )
    mask = None if mask is None else _of_heads(mask, heads, member)
    attended = ring(problem.on(around, problem.ranks // size, size), query, key, value, mask)
    return heads_to_sequence(Exchange(within, queries, (heads,), group), attended)[0]


@on_each_rank
def _of_heads(mask: Tensor, heads: tuple[range, ...], member: int) -> Tensor:
    return part(mask, heads[member], None, None)
