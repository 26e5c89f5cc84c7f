from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, Case, attend, reference
from contract import attention_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor, Replicate, Shard

from meshdiff import Layout, init_mesh, mesh_attention, simulate
from meshdiff.attention.exchange import chunk_sizes, exchange
from meshdiff.mesh import place
from meshdiff.placements import HEADS, SEQUENCE
from meshdiff.simulation import unwrap


def check_values(values, case, exact):
    for name, value, expected in zip(("output", "query", "key", "value"), values, reference(case), strict=True):
        if exact:
            assert torch.equal(value, expected), name
        else:
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=2e-6, msg=name)


def check_traffic(case, ranks, world_size):
    """`ranks` is the traffic of each rank; in a simulation, of the one that sends most."""
    for passed, times in (("forward", 1), ("both", 2)):
        if not case.self_attention or world_size == 1:
            assert all(not rank[passed] for rank in ranks)
            continue
        for rank in ranks:
            assert rank[passed].keys() == {"cp"}
            assert rank[passed]["cp"].keys() == {"all_to_all"}
            assert rank[passed]["cp"]["all_to_all"]["count"] == 2 * times


@settings(max_examples=25)
@given(
    case=st.builds(Case, st.integers(1, 3), st.integers(8, 70), st.integers(1, 9), st.sampled_from([2, 8, 16])),
    ranks=st.integers(1, 8),
)
def test_self_attention_equals_one_device_in_simulation(case, ranks):
    with simulate(ranks):
        values, traffic = attend(case, init_mesh(Layout(1, ranks), "cpu")["cp"])
    check_values(values, case, exact=True)
    check_traffic(case, [traffic], ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_cross_attention_sends_nothing_and_gradients_are_whole(ranks):
    case = CASES[-1]
    with simulate(ranks):
        values, traffic = attend(case, init_mesh(Layout(1, ranks), "cpu")["cp"])
    check_values(values, case, exact=False)
    check_traffic(case, [traffic], ranks)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_real_ranks_equal_one_device_and_send_what_the_contract_says(world_size, tmp_path):
    for case, (values, ranks) in zip(CASES, run_on_ranks("attention", world_size, tmp_path), strict=True):
        check_values(values, case, exact=case.self_attention)
        check_traffic(case, ranks, world_size)
        if not case.self_attention:
            continue
        for rank, traffic in enumerate(ranks):
            expected = attention_bytes(case.batch, case.seq, case.heads, case.head_dim, world_size, rank)
            assert traffic["forward"]["cp"]["all_to_all"]["bytes"] == expected
            # The way back: the output's gradient from tokens, those of q, k, v from heads.
            tokens, heads = chunk_sizes(case.seq, world_size)[rank], chunk_sizes(case.heads, world_size)[rank]
            backward = tokens * (case.heads - heads) + 3 * heads * (case.seq - tokens)
            sent = traffic["both"]["cp"]["all_to_all"]["bytes"] - expected
            assert sent == case.batch * case.head_dim * 4 * backward


def test_bytes_of_an_even_exchange_are_the_formula_of_the_design():
    batch, seq, heads, head_dim, ranks = 2, 64, 8, 16, 4
    formula = 4 * batch * seq * heads * head_dim * 4 * (ranks - 1) // ranks**2
    assert attention_bytes(batch, seq, heads, head_dim, ranks, 0) == formula
    with simulate(ranks):
        _, traffic = attend(Case(batch, seq, heads, head_dim), init_mesh(Layout(1, ranks), "cpu")["cp"])
    assert traffic["forward"] == {"cp": {"all_to_all": {"count": 2, "bytes": formula}}}


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 12), st.integers(1, 5)),
    ranks=st.integers(2, 6),
    count=st.integers(1, 4),
)
def test_exchange_places_what_dtensor_would_and_comes_back(shape, ranks, count):
    tensors = [torch.randn(shape) for _ in range(count)]
    with simulate(ranks):
        mesh = init_mesh(Layout(1, ranks), "cpu")["cp"]
        by_heads = exchange([place(t, mesh, [SEQUENCE]) for t in tensors], SEQUENCE, HEADS)
        assert all(t.placements == (HEADS,) for t in by_heads)
        assert all(torch.equal(unwrap(t.full_tensor()), e) for t, e in zip(by_heads, tensors, strict=True))
        back = exchange(by_heads, HEADS, SEQUENCE)
        assert all(torch.equal(unwrap(t.full_tensor()), e) for t, e in zip(back, tensors, strict=True))


def test_chunk_sizes_are_those_of_dtensor():
    for length in range(20):
        for ranks in range(1, 9):
            chunks = [chunk.shape[0] for chunk in torch.empty(length).chunk(ranks)] if length else []
            assert chunk_sizes(length, ranks) == chunks + [0] * (ranks - len(chunks))


def test_misuse_is_one_clear_error():
    x = torch.randn(1, 16, 4, 8)
    with simulate(4):
        mesh = init_mesh(Layout(2, 2), "cpu")
        cp = mesh["cp"]
        sharded, whole = place(x, cp, [Shard(1)]), place(x, cp, [Replicate()])
        with pytest.raises(ValueError, match="not both"):
            mesh_attention(sharded, x, x)
        with pytest.raises(ValueError, match=r"both Replicate\(\); given query"):
            mesh_attention(place(x, cp, [Shard(2)]), whole, whole)
        with pytest.raises(ValueError, match="1-D mesh"):
            mesh_attention(*[place(x, mesh, [Replicate(), Shard(1)])] * 3)
        with pytest.raises(ValueError, match="one shape"):
            mesh_attention(sharded, place(x[:, :8], cp, [Shard(1)]), place(x[:, :8], cp, [Shard(1)]))
        assert isinstance(mesh_attention(sharded, whole, whole), DTensor)
