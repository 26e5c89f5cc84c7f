"""Rows that move to their new place: those that change hands, and no others."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from meshdiff import CommsCounter, Layout, init_mesh, place, simulate
from meshdiff.attention.problem import chunk_sizes
from meshdiff.autoshard.reshard import SourceSlice, reshard
from meshdiff.distributed.simulation import unwrap


def _moved(lengths: tuple[int, ...], total: int, ranks: int, rank: int) -> int:
    """Rows that a rank sends when whole sources of these lengths become one."""
    owners, first = [], 0
    for length in lengths:
        sizes = chunk_sizes(length, ranks)
        owners += [r for r in range(ranks) for _ in range(sizes[r])]
        first += length
    wanted = [r for r in range(ranks) for _ in range(chunk_sizes(total, ranks)[r])]
    return sum(own == rank and other != rank for own, other in zip(owners, wanted, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("lengths", [(4, 9), (1, 1, 7), (11, 2)])
def test_joining_and_cutting_sends_only_what_changes_hands(lengths, ranks):
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(2, length, 3, generator=generator) for length in lengths]
    whole = torch.cat(sources, dim=1)
    with simulate(ranks):
        mesh = init_mesh(Layout(cp=ranks), "cpu")["cp"]
        shards = [place(source, mesh, [Shard(1)]) for source in sources]
        with CommsCounter(mesh) as comms:
            (joined,) = reshard(shards, [[SourceSlice(i, 0, n) for i, n in enumerate(lengths)]], 1)
        most = max(_moved(lengths, whole.shape[1], ranks, rank) for rank in range(ranks))
        sent = comms.as_dict().get("cp", {})
        assert sent == ({"all_to_all": {"count": 1, "bytes": most * 2 * 3 * 4}} if most else {})
        assert torch.equal(unwrap(joined.full_tensor()), whole)
        text = place(whole[:, :2], mesh, [Replicate()])
        mixed, rest = reshard(
            [joined, text], [[SourceSlice(1, 0, 2), SourceSlice(None, 0, 1)], [SourceSlice(0, 2, 5)]], 1
        )
        assert torch.equal(unwrap(mixed.full_tensor()), torch.cat([whole[:, :2], torch.zeros(2, 1, 3)], dim=1))
        assert torch.equal(unwrap(rest.full_tensor()), whole[:, 2:5])
