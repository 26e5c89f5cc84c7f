"""A description of an attention over a mesh: its sizes, and the tokens that each rank holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.distributed.caching import cached

__all__ = ["Problem", "Tokens", "chunk_ranges", "chunk_sizes", "count"]

Tokens = tuple[range, ...]
"""Positions in the sequence, in the order in which a tensor holds them; joint sequences need two ranges a rank."""


@dataclass(frozen=True)
class Problem:
    """One attention over a 1-D mesh, without its data.

    It is the same on every rank, so whatever is decided from it is decided
    alike everywhere.

    Attributes:
        mesh: the ranks that share the sequence.
        batch, heads, kv_heads, head_dim: sizes of `[batch, seq, heads, head_dim]`;
            `heads / kv_heads` query heads share a head of key and value.
        dtype: of query, key and value.
        queries, keys: for each rank, the positions of the tokens it holds.
        is_causal: True if query i sees keys 0 to i only.
        scale: of the logits; None for `head_dim ** -0.5`.
    """

    mesh: DeviceMesh
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    queries: tuple[Tokens, ...]
    keys: tuple[Tokens, ...]
    is_causal: bool = False
    scale: float | None = None

    @property
    def ranks(self) -> int:
        return len(self.queries)

    @property
    def group(self) -> int:
        """Query heads that share a head of key and value."""
        return self.heads // self.kv_heads

    def query_heads(self, ranks: int) -> tuple[range, ...]:
        """The query heads of each of `ranks` ranks between which the heads are divided."""
        return chunk_ranges(self.heads, ranks)

    def key_heads(self, ranks: int) -> tuple[range, ...]:
        """The heads of key and value that those ranks need; a head may be needed by several."""
        return tuple(
            range(own.start // self.group, -(-own.stop // self.group)) if own else range(0)
            for own in self.query_heads(ranks)
        )

    def on(self, mesh: DeviceMesh, ranks: int, members: int) -> Problem:
        """The part of each of `ranks` groups of `members` neighbours, after the heads are divided between them."""
        blocks = [range(i * members, (i + 1) * members) for i in range(ranks)]
        return replace(
            self,
            mesh=mesh,
            heads=self.heads // members,
            kv_heads=max(1, self.kv_heads // members),
            queries=tuple(tuple(chain.from_iterable(self.queries[i] for i in block)) for block in blocks),
            keys=tuple(tuple(chain.from_iterable(self.keys[i] for i in block)) for block in blocks),
        )


def chunk_sizes(length: int, chunks: int) -> list[int]:
    """Sizes of the parts into which DTensor divides `length`: ceil-sized, the last ones short or empty.

    >>> chunk_sizes(61, 4)
    [16, 16, 16, 13]
    """
    size = -(-length // chunks)
    return [max(0, min(size, length - i * size)) for i in range(chunks)]


@cached
def chunk_ranges(length: int, chunks: int, start: int = 0) -> tuple[range, ...]:
    """The same as ranges of positions, the first of which is `start`.

    >>> chunk_ranges(5, 2)
    (range(0, 3), range(3, 5))
    """
    bounds = accumulate(chunk_sizes(length, chunks), initial=start)
    return tuple(range(first, last) for first, last in pairwise(bounds))


def count(tokens: Tokens) -> int:
    """The number of tokens.

    >>> count((range(0, 3), range(10, 12)))
    5
    """
    return sum(map(len, tokens))
