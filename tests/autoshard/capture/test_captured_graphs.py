"""Captured graphs: what they send, that they can be read, and that they can be compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_every_rank

from meshdiff import CommsCounter, Layout, init_mesh, parallelize
from meshdiff.autoshard.numerics import difference
from tests.autoshard.test_calls import CALLS
from tests.autoshard.test_parallelize import Joint


def wrong(graph):
    return lambda *tensors: [output * 1.01 for output in graph(*tensors)]


def broken(graph):
    """As torch.compile is where there is no compiler: it says so when it is called."""

    def run(*tensors):
        raise NotImplementedError("no compiler")

    return run


def traffic_and_compiled() -> tuple[Any, Any, list[float], str, list[str]]:
    """Traffic of a call on shards and as a graph, and if both give the same bits; of what is made of it, the errors.

    And the code of the graph, and what is told of each.
    """
    mesh = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"]
    torch.manual_seed(0)
    makes = [False, True, torch.compile, wrong, broken]
    models = [Joint("") for _ in makes]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    handles = [parallelize(model, mesh, capture=make) for model, make in zip(models, makes, strict=True)]
    sent, outputs = [], []
    with torch.no_grad():
        for handle in handles:
            for hidden in CALLS * 2:
                with CommsCounter(mesh) as comms:
                    output = handle(hidden, hidden[:, :5] * 2)
            sent.append(comms.as_dict())
            outputs.append(output)
    errors = [difference(output, outputs[0]) for output in outputs]
    told = [handle.captured for handle in handles]
    same = torch.equal(outputs[0], outputs[1])
    return sent[:2], same, errors, handles[1].graphs[0].code, told


@pytest.mark.long
def test_a_graph_sends_what_the_model_sends_and_can_be_read_and_compiled(tmp_path):
    for sent, same, errors, code, told in run_on_every_rank(traffic_and_compiled, 3, tmp_path):
        assert sent[0] == sent[1]
        assert same
        assert max(errors) <= 1e-5
        assert "torch.ops._c10d_functional.all_to_all_single" in code
        assert [";" in words for words in told] == [False, False, False, True, True]
        assert "uncompiled, as the compiled graph gives something else than the model (1.0e-02 apart)" in told[3]
        assert "uncompiled, as the compiled graph cannot run: no compiler" in told[4]
