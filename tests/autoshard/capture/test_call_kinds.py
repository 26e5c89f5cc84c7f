"""Kinds of calls that are captured: those used last are kept, all others are let go, and none are begun in vain."""

from __future__ import annotations

import gc
import re
import weakref
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_every_rank, start_on_ranks
from torch import nn
from untouched_cases import CHANNELS

from meshdiff import Layout, init_mesh, parallelize, simulate
from meshdiff.autoshard.call_key import CallKey, call_key
from meshdiff.autoshard.capture import call_kinds
from meshdiff.autoshard.capture.call_kinds import KINDS, PAUSE, PAYS, TOO_SOON, CallKinds, NotCaptured
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.consensus import store
from tests.autoshard.capture.test_graph_capture import MANY, RAN, Model, nothing, set_factor


def kinds() -> CallKinds[Any]:
    return CallKinds(lambda: SimpleNamespace(runs=0))


def key(i: int) -> CallKey:
    return call_key(nn.Identity(), (torch.empty(i, 3, device="meta"), 1.0), {}, "cpu", exact=True)


def test_those_that_are_used_are_kept():
    kept = kinds()
    first = kept.use(key(0))
    for i in range(1, 20 * KINDS):
        assert kept.use(key(0)) is first
        kept.use(key(i)).runs = PAYS
    assert len(list(kept)) == KINDS
    assert kept.let_go == 20 * KINDS - KINDS
    assert kept.last == f"({19 * KINDS}, 3)"
    assert kept.use(key(1)).runs == 0  # another one


def began(kept: CallKinds[Any], new: int) -> bool:
    try:
        kept.use(key(new))
    except NotCaptured:
        return False
    return True


def test_a_number_that_changes_with_every_call_is_given_up_more_and_more_rarely_tried():
    kept, calls = kinds(), 40 * PAUSE
    tried = [began(kept, i) for i in range(calls)]
    assert all(tried[: KINDS + TOO_SOON - 1])
    assert sum(tried) <= KINDS + 8 * TOO_SOON  # 256 calls without, then 512, ...
    assert sum(tried[calls // 2 :]) >= TOO_SOON
    last = max(i for i in range(calls) if tried[i])
    new = next(i for i in range(calls, 2 * calls) if not began(kept, i))
    assert kept.use(key(last)) is list(kept)[-1]  # what there is goes on
    with pytest.raises(NotCaptured, match="is it given a number that changes"):
        kept.use(key(new))


def test_kinds_that_have_paid_never_end_it():
    kept = kinds()
    for i in range(100 * KINDS):
        assert began(kept, i)
        kept.use(key(i)).runs = PAYS if i % TOO_SOON == 0 else 0


SHAPES, STEPS = 7, 7


@torch.no_grad()
def of_many_shapes() -> tuple[float, int, int, int, str, int]:
    """Of a model that is called with more shapes than are kept: the error, graphs that live, runs of its Python."""
    call_kinds.KINDS, call_kinds.PAYS = 3, 2
    alone, model = Model(nothing), Model(nothing)
    parallel = parallelize(model, init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], capture=True)
    seen: dict[int, weakref.ref] = {}
    error, RAN.get().times, runs = 0.0, 0, 0
    generator = torch.Generator().manual_seed(1)
    for shape in [*range(SHAPES), 0]:
        for _ in range(STEPS):
            hidden = torch.randn(2, 7 + shape, CHANNELS, generator=generator)
            error = max(error, difference(model(hidden)["sample"], alone(hidden)["sample"]))
            runs += 1  # of the model that is alone
        seen |= {id(graph): weakref.ref(graph) for graph in parallel.graphs}
    gc.collect()
    alive = sum(graph() is not None for graph in seen.values())
    shadows = sum(issubclass(type(one), torch._subclasses.FakeTensor) for one in gc.get_objects())
    return error, len(parallel.graphs), alive, RAN.get().times - runs, parallel.captured, shadows


@pytest.mark.parametrize("ranks", [2])
def test_a_new_shape_is_captured_and_the_one_used_longest_ago_let_go(ranks, tmp_path):
    for error, graphs, alive, runs, told, shadows in run_on_every_rank(of_many_shapes, ranks, tmp_path):
        assert error <= 1e-5
        assert (graphs, alive) == (3, 3)
        # Each shape is found out, watched, captured and tried; the first again, but for what was found out.
        assert runs == 4 * SHAPES + 3
        assert f"of {SHAPES + 1 - 3} kinds of calls the graphs were let go" in told
        assert f"let go last: for inputs of (2, {7 + SHAPES - 3}, {CHANNELS})" in told
        assert not shadows  # tracing leaves a tensor for every operation


def test_a_simulation_has_no_graphs():
    with simulate(2), pytest.raises(ValueError, match="capture=True takes real ranks"):
        parallelize(Model(nothing), init_mesh(Layout(cp=2), "cpu")["cp"], capture=True)


def changed_on_one_rank() -> None:
    """Rank 1 alone changes a model that is captured; ends with an error."""
    store().set_timeout(timedelta(seconds=3))
    model = Model(nothing)
    parallelize(model, init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], capture=True)
    with torch.no_grad():
        for step in MANY:
            step(model)
        if dist.get_rank() == 1:
            set_factor(model)
        for step in MANY:
            step(model)


def test_a_rank_that_alone_changes_the_model_is_told(tmp_path):
    ranks = start_on_ranks(changed_on_one_rank, 2, tmp_path)
    assert ranks.exit_codes[1] == 1, ranks
    told = "this rank started the call again (Model was changed: blocks.1.settings"
    assert re.search(rf"\[rank1\]: RuntimeError: {re.escape(told)}", ranks.stderr[1]), ranks
