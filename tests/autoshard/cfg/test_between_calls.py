"""Changes around a model between the two calls of a guided step, the first of which runs later."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from meshdiff import Layout, init_mesh, simulate
from meshdiff.autoshard import Guidance
from meshdiff.distributed.simulation import unwrap

BRANCH: ContextVar[int] = ContextVar("branch", default=0)
X = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))


class Part(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.softplus(hidden_states)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def scaled(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 2

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        by = 1 + BRANCH.get() + int(os.environ.get("BRANCH", "0"))
        return (self.scaled(self.part(hidden_states)) * by + torch.sin(hidden_states),)


class Other(Model):
    def scaled(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * 3


class OtherPart(Part):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states - 1


class Halves(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result / 2 if func is torch.sin else result


@contextmanager
def context_variable(model: Model) -> Iterator[None]:
    token = BRANCH.set(1)
    yield
    BRANCH.reset(token)


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value, raising=False)
        yield


@contextmanager
def environment(model: Model) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRANCH", "1")
        yield


@contextmanager
def hook_of_all_modules(model: Model) -> Iterator[None]:
    handle = register_module_forward_hook(lambda part, args, output: output * 2 if type(part) is Part else None)
    yield
    handle.remove()


CHANGES: dict[str, Callable[[Model], Any]] = {
    "context variable": context_variable,
    "environment": environment,
    "hook of all modules": hook_of_all_modules,
    "function of torch": lambda model: attribute(F, "softplus", torch.relu),
    "class of the model": lambda model: attribute(model, "__class__", Other),
    "class of a part": lambda model: attribute(model.part, "__class__", OtherPart),
    "method of the class": lambda model: attribute(Model, "scaled", lambda self, hidden_states: hidden_states + 5),
    "forward of the class of a part": lambda model: attribute(Part, "forward", OtherPart.forward),
    "new method of a class": lambda model: attribute(Part, "__call__", lambda self, hidden_states: hidden_states + 7),
    "mode": lambda model: Halves(),
}


def clip(model: Model, change: Callable[[Model], Any], first: bool) -> Tensor:
    total = torch.zeros_like(X)
    for step in range(5):
        given = X + step, X - step
        if first:
            with change(model):
                one = model(given[0])[0]
            other = model(given[1])[0]
        else:
            one = model(given[0])[0]
            with change(model):
                other = model(given[1])[0]
        total = total + one + 3 * (other - one)
    return total


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False], ids=["around the first", "around the second"])
@pytest.mark.parametrize("name", CHANGES)
def test_each_call_of_a_step_runs_with_what_was_there(name, first):
    change = CHANGES[name]
    expected = clip(Model(), change, first)
    assert not torch.equal(expected, clip(Model(), lambda model: attribute(os, "unused", 0), first))
    model = Model()
    with simulate(2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        video = clip(model, change, first)
    assert torch.equal(unwrap(video), expected)
