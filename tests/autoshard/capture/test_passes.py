"""Captured programs, once tidied: the same results of fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from meshdiff.autoshard.capture.passes import tidy


def detours(tokens, weight):
    made = tokens @ weight
    heads = made.unflatten(-1, (3, -1)).transpose(1, 2).transpose(1, 2)
    rows, rest = heads.permute(1, 0, 2, 3).split([2, 5])
    rest[1:, 0].mul_(2)
    made[:, ::2].view(torch.int32)[..., 0] += 1
    made.new_empty(3), rows.sum()
    return [tokens[1:].mT, heads.flatten(2), rows.transpose(0, 1) + heads[:, :2], rest.flatten(2), made, weight.t()]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_tidy_program_does_the_same_with_fewer_operations(at_once):
    weight, elsewhere = torch.randn(12, 12), torch.randn(400)
    inputs = [(torch.randn(2, 7, 12), weight), (elsewhere[5:173].view(2, 7, 12), elsewhere[200:344].view(12, 12))]
    program = make_fx(detours)(*inputs[0])
    before = len(program.graph.nodes)
    tidy(program, inputs[0], at_once)
    assert len(program.graph.nodes) < before - 5
    assert "new_empty" not in program.code
    assert "sum" not in program.code
    for given in inputs:
        for found, expected in zip(program(*given), detours(*given), strict=True):
            assert torch.equal(found, expected)
