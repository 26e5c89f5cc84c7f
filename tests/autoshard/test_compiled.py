"""Models that are on a mesh, of which something is compiled later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ranks import run_on_every_rank
from torch import nn
from torch.fx import GraphModule
from untouched_cases import Model, inputs

from meshdiff import Layout, init_mesh, parallelize

TRACED: list[str] = []


def noted(graph: GraphModule, examples: Any) -> Callable:
    """A backend that changes nothing."""
    TRACED.extend(node.name for node in graph.graph.nodes if node.op.startswith("call"))
    return graph


def a_block(model: Model) -> Callable:
    model.attention_blocks[0] = torch.compile(model.attention_blocks[0], backend=noted)
    return model


def a_part_of_a_block(model: Model) -> Callable:
    block = model.attention_blocks[0]
    name = next(name for name, part in block.named_children() if isinstance(part, nn.Linear))
    setattr(block, name, torch.compile(getattr(block, name), backend=noted))
    return model


def code_in_a_block(model: Model) -> Callable:
    forward = model.attention_blocks[0].forward
    model.attention_blocks[0].forward = torch.compile(forward, backend=noted)
    return model


def the_model(model: Model) -> Callable:
    nn.Module.compile(model, backend=noted)
    return model


def code_around(model: Model) -> Callable:
    return torch.compile(lambda **given: model(**given), backend=noted)


def test_what_is_compiled_later_runs_as_it_is_on_the_mesh(tmp_path):
    """On real ranks: within a simulation nothing is compiled."""
    assert run_on_every_rank(on_this_rank, 2, tmp_path) == [[], []]


def on_this_rank() -> list[str]:
    """Of what was traced, the names; raises if a number is not that of one device."""
    given = inputs()
    with torch.no_grad():
        for compiled in (a_block, a_part_of_a_block, code_in_a_block, the_model, code_around):
            model, expected = Model(), Model()(**given)
            parallelize(model, init_mesh(Layout(cp=2), "cpu")["cp"])
            model(**given)
            run = compiled(model)
            for _ in range(3):
                assert torch.allclose(run(**given), expected, atol=1e-5), compiled.__name__
            assert not TRACED, (compiled.__name__, TRACED)
    return TRACED
