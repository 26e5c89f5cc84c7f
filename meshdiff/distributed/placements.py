"""Names of placements: the dim of a tensor that a mesh dim divides."""

from __future__ import annotations

from torch.distributed.tensor import Replicate, Shard

__all__ = ["BRANCHES", "HEADS", "PARTS", "POSITIONS", "REPLICATED", "SEQUENCE"]

SEQUENCE = Shard(1)
"""The sequence of tokens `[batch, seq, channels]` and of attention's `[batch, seq, heads, head_dim]`."""
HEADS = Shard(2)
"""The heads of `[batch, seq, heads, head_dim]`."""
BRANCHES = Shard(0)
"""The branches of a tensor with one entry for each guidance branch, `[branches, ...]`."""
POSITIONS = Shard(0)
"""The positions of a table with one row for each token, `[seq, ...]`."""
PARTS = Shard(0)
"""The parts of a flat buffer, `[elements]`."""
REPLICATED = Replicate()
"""The same on every rank."""
