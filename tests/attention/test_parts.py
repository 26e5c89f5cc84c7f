"""What the strategies are made of: the exchange, the blocks of a ring, DTensor's own division."""

from __future__ import annotations

import draws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from meshdiff import Layout, init_mesh, place, simulate
from meshdiff.attention.block_kernels import attend_block, attend_block_backward
from meshdiff.attention.problem import chunk_ranges, chunk_sizes
from meshdiff.attention.seq_head_exchange import Exchange, heads_to_sequence, sequence_to_heads
from meshdiff.distributed.simulation import rank_values


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_block_without_a_kernel_is_that_of_the_kernel(masked, kv_heads, monkeypatch):
    query, gradient = torch.randn(2, 2, 4, 9, 8)
    key, value = torch.randn(2, 2, kv_heads, 11, 8)
    mask = torch.rand(1, 1, 9, 11) < 0.6 if masked else None
    if masked:
        mask[..., 3, :] = False
    outcomes = []
    for kernel in ("cpu_flash", "explicit"):
        monkeypatch.setattr("meshdiff.attention.block_kernels._kernel", lambda query, mask, kernel=kernel: kernel)
        output, lse = attend_block(query, key, value, mask, None)
        gradients = attend_block_backward(gradient, query, key, value, mask, output, lse, None)
        outcomes.append([output, lse, *gradients])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=draws.times(15))
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 12), st.integers(1, 5)),
    ranks=st.integers(2, 6),
    count=st.integers(1, 4),
)
def test_exchange_places_what_dtensor_would_and_comes_back(shape, ranks, count):
    tensors = [torch.randn(shape) for _ in range(count)]
    with simulate(ranks):
        mesh = init_mesh(Layout(1, ranks), "cpu")["cp"]
        shards = [place(tensor, mesh, [Shard(1)]).to_local() for tensor in tensors]
        heads = (chunk_ranges(shape[2], ranks),) * count
        exchange = Exchange(mesh, (tuple(chunk_sizes(shape[1], ranks)),), heads)
        by_heads = sequence_to_heads(exchange, *shards)
        for shard, tensor in zip(by_heads, tensors, strict=True):
            for rank, value in enumerate(rank_values(shard)):
                own = heads[0][rank]
                assert torch.equal(value, tensor[:, :, own.start : own.stop])
        back = heads_to_sequence(exchange, *by_heads)
        for shard, came_back in zip(shards, back, strict=True):
            assert all(map(torch.equal, rank_values(shard), rank_values(came_back)))


def test_chunk_sizes_are_those_of_dtensor():
    for length in range(20):
        for ranks in range(1, 9):
            chunks = [chunk.shape[0] for chunk in torch.empty(length).chunk(ranks)] if length else []
            assert chunk_sizes(length, ranks) == chunks + [0] * (ranks - len(chunks))
