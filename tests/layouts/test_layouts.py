"""The parity suite: one program, one result, whatever the layout. Everything new adds itself here."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from importlib import import_module

import draws
import on_ranks
import pytest
import torch
from attention_cases import ANY_HEADS
from contract import attention, of_rank, run_traffic
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from tiny import REQUEST, TOKENS, alone, make, tiny_model

from meshdiff import DigitsModel, InputError, Layout, Pipeline, Request, init_mesh, simulate
from meshdiff.diffusion.sampling import SOLVERS
from meshdiff.distributed.simulation import on_each_rank
from meshdiff.pipeline import check_strategy

TOLERANCE = 1e-5


@cache
def on_one_device(request: Request, branches: int, heads: int) -> torch.Tensor:
    with alone():
        return make(Layout(), branches, request, heads)[0]


@st.composite
def cases(draw):
    branches = draw(st.integers(1, 3))
    cfg = draw(st.integers(1, branches))
    layout = Layout(cfg=cfg, cp=draw(st.integers(1, 8 if cfg == 1 else 4)))
    # From 64 tokens, where 8 ranks divide everything, to 125 or 175, where few do.
    frames, height, width = draw(st.sampled_from([(8, 32, 32), (10, 40, 32), (10, 40, 40), (14, 40, 40)]))
    solver = draw(st.sampled_from([*SOLVERS]))
    return (
        layout,
        Request("a 7 moving left", frames=frames, height=height, width=width, steps=2, solver=solver),
        branches,
    )


@settings(max_examples=draws.times(8))
@given(case=cases(), heads=st.sampled_from([4, 6, 8]))
def test_simulated_layouts_agree_with_one_device_and_keep_the_contract(case, heads):
    layout, request, branches = case
    with simulate(layout.world_size):
        video, comms = make(layout, branches, request, heads)
    assert torch.equal(video, on_one_device(request, branches, heads))
    assert comms == run_traffic(layout, tiny_model(heads).config, request, branches)


@pytest.mark.parametrize("layout", [Layout(2, 1), Layout(2, 2), Layout(1, 4), Layout(2, 4)], ids=str)
def test_simulated_layouts_agree_to_the_bit(layout):
    request = Request("a 7 moving left", frames=16, height=32, width=32, steps=3)  # 128 tokens
    with simulate(layout.world_size):
        video, _ = make(layout, 2, request, heads=8)
    assert torch.equal(video, on_one_device(request, 2, 8))


def test_shipped_weights_agree_to_the_bit_where_shards_are_awkward():
    """They magnify what random weights hide: 34 tokens are a block of the CPU's attention kernel and 2 more."""
    request = Request("a 7 moving left", frames=10, height=40, steps=4)

    def clip(layout: Layout) -> torch.Tensor:
        with simulate(layout.world_size) if layout.world_size > 1 else alone():
            return Pipeline(DigitsModel.load(), init_mesh(layout, "cpu")).generate(request)

    assert torch.equal(clip(Layout(1, 3)), clip(Layout()))


@pytest.mark.parametrize("strategy", ANY_HEADS)
def test_a_run_takes_the_strategy_that_is_asked_for(strategy):
    with simulate(3):
        video, comms = make(Layout(1, 3), 2, strategy=strategy)
    torch.testing.assert_close(video, on_one_device(REQUEST, 2, 6), rtol=0, atol=TOLERANCE)
    assert comms == run_traffic(Layout(1, 3), tiny_model().config, REQUEST, 2, strategy=strategy)


def test_hybrid_on_real_ranks_agrees_and_keeps_the_contract(tmp_path):
    video, ranks = run_on_ranks(on_ranks.hybrid, 4, tmp_path)
    torch.testing.assert_close(video, on_one_device(REQUEST, 2, 6), rtol=0, atol=TOLERANCE)
    config = tiny_model().config
    for rank, traffic in enumerate(ranks):
        shape = (2, TOKENS, TOKENS, config.heads, config.heads, config.head_dim)
        sent, _ = attention("hybrid", shape, 4, rank)
        assert traffic["cp"]["all_to_all"] == {
            kind: sent["all_to_all", kind] * config.depth * REQUEST.steps for kind in ("count", "bytes")
        }


@pytest.mark.parametrize(("cp", "fits"), [(1, True), (3, False), (4, True), (5, False), (6, False)])
def test_hybrid_needs_heads_that_some_ranks_divide(cp, fits):
    with nullcontext() if fits else pytest.raises(InputError, match=f"--strategy hybrid: .* 6 heads are on {cp} ranks"):
        check_strategy(tiny_model(heads=6), Layout(1, cp), "hybrid")


REAL = {2: [(2, 1), (1, 2)], 3: [(1, 3), (3, 1)], 4: [(2, 2), (1, 4)], 8: [(2, 4)]}


@pytest.mark.parametrize("world_size", REAL)
def test_real_ranks_agree_with_one_device_and_keep_the_contract(world_size, tmp_path):
    results = run_on_ranks(on_ranks.layouts, world_size, tmp_path)
    for cfg, cp in REAL[world_size]:
        layout, branches = Layout(cfg, cp), 3 if cfg == 3 else 2
        video, ranks = results[str(layout)]
        torch.testing.assert_close(video, on_one_device(REQUEST, branches, 6), rtol=0, atol=TOLERANCE)
        expected = run_traffic(layout, tiny_model().config, REQUEST, branches)
        for rank, traffic in enumerate(ranks):
            config, batch = tiny_model().config, -(-branches // cfg)
            assert traffic == of_rank(expected, layout, config, TOKENS, REQUEST.steps, batch, rank)


@pytest.mark.long
def test_compiled_blocks_give_the_same_and_send_the_same(tmp_path):
    video, ranks = run_on_ranks(on_ranks.compiled, 3, tmp_path)
    torch.testing.assert_close(video, on_one_device(REQUEST, 2, 6), rtol=0, atol=TOLERANCE)
    expected = run_traffic(Layout(1, 3), tiny_model().config, REQUEST, 2)
    for rank, traffic in enumerate(ranks):
        assert traffic == of_rank(expected, Layout(1, 3), tiny_model().config, TOKENS, REQUEST.steps, 2, rank)


@pytest.mark.parametrize("broken_rank", [0, 1, 2])
def test_parity_fails_when_attention_is_wrong_on_one_rank_only(broken_rank, monkeypatch):
    ulysses_module = import_module("meshdiff.attention.ulysses")
    attend = ulysses_module._attend

    @on_each_rank
    def disturb(shard: torch.Tensor, rank: int) -> torch.Tensor:
        return shard * 1.01 if rank == broken_rank else shard

    def attend_badly(problem, rank, query, *others):
        return attend(problem, rank, disturb(query, rank), *others)

    monkeypatch.setattr(ulysses_module, "_attend", attend_badly)
    with simulate(3):
        video, _ = make(Layout(1, 3), 2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(video, on_one_device(REQUEST, 2, 6), rtol=0, atol=TOLERANCE)
