"""Ulysses: every rank sees the full sequence for some of the heads.

Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509.

    query, key, value   [batch, seq/N, heads, head_dim]
      one all-to-all -> [batch, seq, heads/N, head_dim]     attention, nothing sent
      one all-to-all -> [batch, seq/N, heads, head_dim]

Each rank sends `4 * batch * seq * heads * head_dim * (N-1)/N^2` elements. Heads
that N does not divide are divided unevenly: right, but the ranks with fewer
heads wait.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.local import in_order, is_in_order, out_of_order, scaled_dot_product_attention
from meshdiff.attention.masks import part
from meshdiff.attention.problem import Problem, Tokens, count
from meshdiff.attention.seq_head_exchange import Exchange, heads_to_sequence, sequence_to_heads
from meshdiff.distributed.caching import lru_cache_by_mesh
from meshdiff.distributed.local_shards import place_on
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["ulysses"]


def ulysses(problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """A `meshdiff.attention.strategy.Strategy`, which says what it takes and returns."""
    _, rank = place_on(problem.mesh)
    if problem.ranks == 1:
        (queries,), (keys,) = problem.queries, problem.keys
        query, key, value = in_order(query, queries), in_order(key, keys), in_order(value, keys)
        return out_of_order(_attend(problem, rank, query, key, value, mask), queries)
    of_queries, of_keys, of_all = _exchanges(problem.mesh, problem)
    if of_all is not None:
        query, key, value = sequence_to_heads(of_all, query, key, value)
    else:
        (query,) = sequence_to_heads(of_queries, query)
        key, value = sequence_to_heads(of_keys, key, value)
    attended = _attend(problem, rank, query, key, value, mask)
    return heads_to_sequence(of_queries, attended)[0]


@lru_cache_by_mesh
def _exchanges(mesh: DeviceMesh, problem: Problem) -> tuple[Exchange, Exchange, Exchange | None]:
    """Of query, of key and value, and of all three where they have the same tokens."""

    def exchange(tokens: tuple[Tokens, ...], *heads: tuple[range, ...], of_queries: bool = True) -> Exchange:
        order = None if is_in_order(chain.from_iterable(tokens)) else tokens
        return Exchange(mesh, (tuple(map(count, tokens)),), heads, order=order, of_queries=of_queries)

    own, of_keys = problem.query_heads(problem.ranks), problem.key_heads(problem.ranks)
    together = exchange(problem.queries, own, of_keys, of_keys) if problem.queries == problem.keys else None
    return exchange(problem.queries, own), exchange(problem.keys, of_keys, of_keys, of_queries=False), together


@on_each_rank
def _attend(problem: Problem, rank: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a rank's heads, whose tokens are in the order of the sequence."""
    own, of_keys = problem.query_heads(problem.ranks)[rank], problem.key_heads(problem.ranks)[rank]
    key, value = (_for_queries(problem, own, of_keys, tensor) for tensor in (key, value))
    rows = None if mask is None else part(mask, own, None, None)
    return scaled_dot_product_attention(query, key, value, rows, problem.is_causal, problem.scale)


def _for_queries(problem: Problem, own: range, of_keys: range, tensor: Tensor) -> Tensor:
    """Heads of key or value such that query heads divide evenly between them."""
    needed = [head // problem.group - of_keys.start for head in own]
    even = len(own) // max(1, len(of_keys))
    if needed == [i // even for i in range(len(of_keys) * even)]:
        return tensor
    return tensor.index_select(2, torch.tensor(needed, device=tensor.device))
