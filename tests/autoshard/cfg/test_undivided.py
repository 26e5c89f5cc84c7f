"""Calls on cfg that every rank does in full, which are to be as well guarded as those that are divided; and rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshdiff import Layout, init_mesh, simulate
from meshdiff.autoshard import Guidance
from meshdiff.distributed.simulation import unwrap


class Scale(nn.Module):
    is_cache_enabled = False

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(4))

    def forward(self, hidden_states: Tensor, pair: Tensor | None = None, option: Any = None) -> tuple[Tensor]:
        return (hidden_states * self.by * (1 if pair is None else pair[0] + 2 * pair[-1]),)


def with_gradients(model: Scale, given: Tensor) -> Tensor:
    return model(given)[0]


@torch.no_grad()
def with_a_cache(model: Scale, given: Tensor) -> Tensor:
    model.is_cache_enabled = True
    return model(given)[0]


@torch.no_grad()
def with_an_object(model: Scale, given: Tensor) -> Tensor:
    return model(given, option=object())[0]


@pytest.mark.parametrize("call", [with_gradients, with_a_cache, with_an_object])
@pytest.mark.parametrize("check", ["0", "1"])
def test_ranks_that_are_given_other_inputs_are_told(call: Callable[[Scale, Tensor], Tensor], check, monkeypatch):
    monkeypatch.setenv("MESHDIFF_CHECK", check)
    same, model = torch.ones(1, 3, 4), Scale()
    with simulate(2):
        Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        apart = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))  # a simulation draws for each rank
        with pytest.raises(ValueError, match="Scale has other inputs on rank 1 of this mesh than on rank 0"):
            call(model, apart)
        for _ in range(5):
            assert torch.equal(unwrap(call(model, same).detach()), same)
        if check == "1":
            with pytest.raises(ValueError, match="Scale has other inputs on rank 1"):
                call(model, apart)


def test_rows_are_tried_again_where_those_of_an_argument_are_no_longer_the_same():
    """Equal rows say nothing about whether they are rows of the batch."""
    given, model = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), Scale()
    pairs = [torch.tensor(pair) for pair in ([1.0, 1.0], [1.0, 1.0], [1.0, 0.5], [1.0, 0.25])]
    plain = Scale()
    with simulate(2), torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        found = [unwrap(model(given, pair)[0]) for pair in pairs]
    with torch.no_grad():
        assert all(torch.equal(video, plain(given, pair)[0]) for video, pair in zip(found, pairs, strict=True))
    assert any("does not do the 2 rows of a batch apart" in str(one.message) for one in told)
