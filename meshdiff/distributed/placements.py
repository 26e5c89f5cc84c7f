"""The names of placements: which dim of a tensor a mesh dim divides."""

from __future__ import annotations

from torch.distributed.tensor import Replicate, Shard

__all__ = ["BRANCHES", "HEADS", "PARTS", "POSITIONS", "REPLICATED", "SEQUENCE"]

SEQUENCE = Shard(1)
"""Of tokens `[batch, seq, channels]` and of attention's `[batch, seq, heads, head_dim]`."""
HEADS = Shard(2)
"""Of `[batch, seq, heads, head_dim]`."""
BRANCHES = Shard(0)
"""Of anything with one entry a guidance branch, `[branches, ...]`."""
POSITIONS = Shard(0)
"""Of tables with one row a token, `[seq, ...]`."""
PARTS = Shard(0)
"""Of a flat buffer, `[elements]`."""
REPLICATED = Replicate()
"""The same on every rank."""
