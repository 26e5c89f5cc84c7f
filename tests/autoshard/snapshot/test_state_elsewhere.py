"""State in other places than attributes of a model: objects with slots, iterators, arrays, modules of Python."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any, cast

import counting_elsewhere
import numpy as np
import pytest
import torch
from counting_elsewhere import Settings
from torch import Tensor, nn

from meshdiff import Layout, init_mesh, simulate
from meshdiff.autoshard import Guidance
from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot
from meshdiff.distributed.simulation import unwrap

NUMBERS = itertools.count(1)
X = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))


class Slots:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Table(dict):
    calls = 0


class Helper:
    def count(self) -> float:
        counting_elsewhere.calls += 1
        return counting_elsewhere.calls

    @property
    def counted(self) -> float:
        return self.count()


class Part(nn.Module):
    calls = 0


class Holder(nn.Module):
    """Has one of everything to count with."""

    def __init__(self) -> None:
        super().__init__()
        global NUMBERS
        NUMBERS, counting_elsewhere.calls, Settings.calls = itertools.count(1), 0, 0
        self.slots, self.numbers, self.random = Slots(), itertools.count(1), random.Random(0)
        self.array, self.generator, self.old = np.zeros(3), np.random.default_rng(0), np.random.RandomState(0)
        self.parts, self.position = [Part()], torch.zeros(())
        self.table, self.helper = Table(), Helper()
        self.made = (n for n in range(1, 100))


def in_slots(model: Holder) -> float:
    model.slots.calls += 1
    return model.slots.calls


def in_array(model: Holder) -> float:
    model.array[1] += 1
    return float(model.array[1])


def of_no_ones_child(model: Holder) -> float:
    model.parts[0].calls += 1
    return model.parts[0].calls


def of_module(model: Holder) -> float:
    counting_elsewhere.calls += 1
    return counting_elsewhere.calls


def of_class(model: Holder) -> float:
    Settings.calls += 1
    return Settings.calls


def of_import(model: Holder) -> float:
    import counting_elsewhere as own

    own.calls += 1
    return own.calls


def in_place(model: Holder) -> float:
    model.position.add_(1)
    return float(model.position)


def beneath(model: Holder) -> float:
    model.position.data.add_(1)
    return float(model.position)


def drawn(model: Holder) -> float:
    return model.random.random()


def drawn_of_numpy(model: Holder) -> float:
    return float(model.generator.random() + model.old.rand())


def iterator(model: Holder) -> float:
    return next(model.numbers)


def generator(model: Holder) -> float:
    return next(model.made)


def of_global(model: Holder) -> float:
    return next(NUMBERS)


def of_subclass_of_dict(model: Holder) -> float:
    model.table.calls += 1
    return model.table.calls


def of_helper(model: Holder) -> float:
    return model.helper.count()


def of_getter(model: Holder) -> float:
    return model.helper.counted


def by_its_module(model: Holder) -> float:
    return counting_elsewhere.count()


def drawn_of_all(model: Holder) -> float:
    return float(np.random.rand())


def enclosing() -> Callable[[Any], float]:
    calls = 0

    def in_class(model: Holder) -> float:
        nonlocal calls
        calls += 1
        return calls

    return in_class


class Inherited(Holder):
    def count(self) -> float:
        counting_elsewhere.calls += 1
        return counting_elsewhere.calls


def of_base_class(model: Holder) -> float:
    return Inherited.count(cast(Inherited, model))


NAMES: dict[Callable[[Holder], float], str] = {
    in_slots: "slots",
    in_array: "array",
    of_no_ones_child: "parts.calls",
    of_module: "counting_elsewhere.calls",
    of_class: "Settings.calls",
    of_import: "counting_elsewhere.calls",
    in_place: "position",
    beneath: "values of weights",
    drawn: "random",
    drawn_of_numpy: "generator",
    iterator: "numbers",
    generator: "made",
    of_global: "NUMBERS",
    of_subclass_of_dict: "table",
    of_helper: "counting_elsewhere.calls",
    of_getter: "counting_elsewhere.calls",
    by_its_module: "counting_elsewhere.calls",
    drawn_of_all: "random numbers",
    enclosing: "variables",
    of_base_class: "counting_elsewhere.calls",
}


def build(count: Callable[[Holder], float], begins: float) -> nn.Module:
    """A model that scales what it is given by how often it was called, if that is large enough."""

    counter = enclosing() if count is enclosing else count

    class Model(Holder):
        def __init__(self) -> None:
            super().__init__()
            if count is not iterator:  # nobody can see of one that it is at rest
                del self.numbers
            if count is not generator:
                del self.made

        def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
            due = hidden_states.abs().max() >= begins
            return (hidden_states * counter(self) if due else hidden_states * 2,)

    return Model()


def clip(model: nn.Module) -> Tensor:
    total = torch.zeros_like(X)
    for step in range(6):
        scale = 100 if step > 3 else 1
        first, second = model(scale * (X + step))[0], model(scale * (X - step))[0]
        total = total + first + 3 * (second - first)
    return total


@torch.no_grad()
@pytest.mark.parametrize("begins", [0, 50], ids=["at once", "late"])
@pytest.mark.parametrize("count", NAMES)
def test_a_model_that_keeps_state_elsewhere_is_right(count, begins):
    np.random.seed(0)
    expected = clip(build(count, begins))
    np.random.seed(0)
    model = build(count, begins)
    with simulate(2), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guidance = Guidance(model, init_mesh(Layout(cfg=2), "cpu")["cfg"])
        video = clip(model)
    assert torch.equal(unwrap(video), expected)
    assert guidance.fallback.startswith("keeps something from one call to the next ("), guidance.fallback
    assert NAMES[count] in guidance.fallback


@pytest.mark.parametrize(
    "count", [count for count in NAMES if count not in (iterator, generator, of_global, enclosing)]
)
def test_what_has_changed_is_put_back(count):
    """Not iterators."""
    model: Any = build(count, 0)
    before = ModuleSnapshot(model)
    first = [count(model) for _ in range(3)]
    now = before.retake()
    assert before.diff(now)
    before.restore(now)
    assert [count(model) for _ in range(3)] == first


def test_drawing_from_the_generator_of_numpy_is_a_change_that_is_put_back():
    before = ModuleSnapshot(nn.Linear(2, 2))
    drawn: Any = np.random.rand(4)
    now = before.retake()
    assert before.diff(now)
    before.restore(now)
    assert np.array_equal(np.random.rand(4), drawn)
