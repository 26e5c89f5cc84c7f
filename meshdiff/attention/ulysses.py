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

from itertools import chain

import torch
from torch import Tensor

from meshdiff.attention.exchange import Exchange, heads_to_sequence, sequence_to_heads
from meshdiff.attention.local import in_order, out_of_order, scaled_dot_product_attention
from meshdiff.attention.masks import part
from meshdiff.attention.problem import Problem, count
from meshdiff.simulation import on_each_rank

__all__ = ["ulysses"]


def ulysses(problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """See `meshdiff.attention.mesh_attention`; of each rank's shards."""
    mesh, rank = problem.mesh, problem.mesh.get_local_rank()
    if problem.ranks == 1:
        return _attend(problem, rank, query, key, value, mask)
    heads, key_heads = problem.query_heads(problem.ranks), problem.key_heads(problem.ranks)
    queries, keys = (tuple(map(count, tokens)) for tokens in (problem.queries, problem.keys))
    if queries == keys:
        query, key, value = sequence_to_heads(
            Exchange(mesh, (queries,), (heads, key_heads, key_heads)), query, key, value
        )
    else:
        (query,) = sequence_to_heads(Exchange(mesh, (queries,), (heads,)), query)
        key, value = sequence_to_heads(Exchange(mesh, (keys,), (key_heads, key_heads)), key, value)
    attended = _attend(problem, rank, query, key, value, mask)
    return heads_to_sequence(Exchange(mesh, (queries,), (heads,)), attended)[0]


@on_each_rank
def _attend(problem: Problem, rank: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of a rank's heads, whose tokens are in the order of ranks before and after."""
    own, of_keys = problem.query_heads(problem.ranks)[rank], problem.key_heads(problem.ranks)[rank]
    queries, keys = (tuple(chain.from_iterable(tokens)) for tokens in (problem.queries, problem.keys))
    key, value = (_for_queries(problem, own, of_keys, in_order(tensor, keys)) for tensor in (key, value))
    rows = None if mask is None else part(mask, own, None, None)
    attended = scaled_dot_product_attention(
        in_order(query, queries), key, value, rows, problem.is_causal, problem.scale
    )
    return out_of_order(attended, queries)


def _for_queries(problem: Problem, own: range, of_keys: range, tensor: Tensor) -> Tensor:
    """Heads of key or value such that query heads divide evenly between them."""
    needed = [head // problem.group - of_keys.start for head in own]
    even = len(own) // max(1, len(of_keys))
    if needed == [i // even for i in range(len(of_keys) * even)]:
        return tensor
    return tensor.index_select(2, torch.tensor(needed, device=tensor.device))
