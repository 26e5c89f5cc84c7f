"""Snapshots of a module: what each policy sees, what is restored, and what cannot be seen into."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from weight_kinds import Scaled

from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot, Unrestorable
from meshdiff.autoshard.snapshot.policy import Policy

FACTOR = 1.0
NUMBERS = np.arange(3)


class Settings:
    """An object like those that models are configured with."""

    shared = 1

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class Model(nn.Module):
    """Has one of everything that can change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.long_weight = (nn.Parameter(torch.ones(n), requires_grad=False) for n in (4, 3000))
        self.small, self.large = nn.Buffer(torch.zeros(4)), nn.Buffer(torch.zeros(3000))
        self.scaled = Scaled(torch.ones(2), torch.ones(2))
        self.number, self.zero, self.flag, self.nan = 1, 0.0, True, float("nan")
        self.parts = nn.ModuleList([nn.Identity(), nn.Linear(4, 4)])
        self.words, self.pair, self.nothing, self.empty = ["a", [1, 2]], (1, [2]), None, dict[str, int]()
        self.table: dict[Any, Any] = OrderedDict(a=1, b={"c": [1], 1: 0})
        self.keys = {Settings(by=1): 1}
        self.long = list(range(1000))
        self.settings = Settings(inner=Settings(by=1.0), names={"a", "b"})
        self.normal = torch.distributions.Normal(0.0, 1.0)
        self.forward_hook = lambda: enclosed[0]
        enclosed = [1]
        self.enclosed = functools.partial(lambda items: items, enclosed)

    def forward(self, x: Tensor) -> Tensor:
        return x * FACTOR + float(NUMBERS[0]) + self.settings.shared


class Other(nn.Linear):
    pass


def set_global(model: Model) -> None:
    global FACTOR
    FACTOR += 1.0


Change = Callable[[Model], Any]
SEEN: dict[str, tuple[Change, str, str]] = {
    # The change, and words of what STATE and GUARD call it; "" if that is no change.
    "a number": (lambda m: setattr(m, "number", 2), "number", "number"),
    "the same number": (lambda m: setattr(m, "number", int("1")), "", ""),
    "the sign of zero": (lambda m: setattr(m, "zero", -0.0), "zero", "zero"),
    "another NaN": (lambda m: setattr(m, "nan", float("nan")), "", ""),
    "1 for True": (lambda m: setattr(m, "flag", 1), "flag", "flag"),
    "1.0 for 1": (lambda m: setattr(m, "number", 1.0), "number", "number"),
    "something for None": (lambda m: setattr(m, "nothing", 1), "nothing", "nothing"),
    "a new attribute": (lambda m: setattr(m, "new", 1), "new", "new"),
    "a lost attribute": (lambda m: delattr(m, "number"), "number", "number"),
    "an item of a list": (lambda m: m.words.append("b"), "words", "words"),
    "an item of a list in a list": (lambda m: m.words[1].append(3), "words", "words"),
    "an item of a list in a tuple": (lambda m: m.pair[1].append(3), "pair", "pair"),
    "a list that is equal": (lambda m: setattr(m, "words", ["a", [1, 2]]), "", ""),
    "a tuple for a list": (lambda m: setattr(m, "words", ("a", [1, 2])), "words", "words"),
    "an item of a dict that was empty": (lambda m: m.empty.update(a=1), "empty", "empty"),
    "an item deep in a dict": (lambda m: m.table["b"]["c"].append(2), "table", "table"),
    "the type of a key": (lambda m: m.table["b"].update({True: m.table["b"].pop(1)}), "table", "table"),
    "an attribute of a key": (lambda m: setattr(next(iter(m.keys)), "by", 2), "keys", "keys"),
    "the order of a dict": (lambda m: m.table.move_to_end("a"), "", "table"),
    "the order of attributes": (lambda m: setattr(m, "number", vars(m).pop("number")), "", "the order of its"),
    "an item of a long list": (lambda m: m.long.__setitem__(500, 0), "", "long"),
    "the length of a long list": (lambda m: m.long.append(0), "long", "long"),
    "an item of a set": (lambda m: m.settings.names.add("c"), "settings", "settings"),
    "an attribute deep in objects": (lambda m: setattr(m.settings.inner, "by", 2.0), "settings", "settings"),
    "an object that is equal": (lambda m: setattr(m, "settings", Settings(**vars(m.settings))), "settings", "settings"),
    "an attribute of an object of torch": (lambda m: setattr(m.normal, "loc", torch.ones(())), "", "normal"),
    "a variable that is enclosed": (lambda m: m.enclosed.args[0].append(1), "forward_hook", "forward_hook"),
    "an attribute of a class": (lambda m: setattr(Settings, "shared", Settings.shared + 1), "shared", "shared"),
    "a method of a class": (lambda m: setattr(Model, "extra", lambda self: 1), "extra", "extra"),
    "a global": (set_global, "FACTOR", "FACTOR"),
    "an array that is global": (lambda m: NUMBERS.__iadd__(1), "NUMBERS", "NUMBERS"),
    "a hook of its own": (lambda m: m.register_forward_hook(print), "", ""),
    "a hook of a part": (lambda m: m.parts[1].register_forward_hook(print), "parts.1._forward_hooks", "parts.1"),
    "another part": (lambda m: m.parts.append(nn.Identity()), "parts", "parts"),
    "parts in another order": (lambda m: m.parts._modules.update({"0": m.parts._modules.pop("0")}), "", "parts"),
    "another class of a part": (lambda m: setattr(m.parts[1], "__class__", Other), "its class", "its class"),
    "another weight": (lambda m: setattr(m, "weight", nn.Parameter(torch.ones(4))), "weight", "weight"),
    "a write to a weight": (lambda m: m.weight.add_(1), "weight", ""),
    "a write beneath a weight": (lambda m: m.weight.data.add_(1), "values of weights", ""),
    "a write to a buffer": (lambda m: m.large.add_(1), "large", ""),
    "a tensor in a tensor": (lambda m: setattr(m.scaled, "scale", torch.ones(2)), "", "scaled"),
    "the layout of a weight": (lambda m: setattr(m.weight, "data", torch.ones(4, 2)[:, 0]), "values", "weight"),
    "the dtype of a weight": (lambda m: setattr(m.weight, "data", torch.ones(4).half()), "", "weight"),
    "gradients of a weight": (lambda m: m.weight.requires_grad_(), "", "weight"),
    "random numbers": (lambda m: torch.rand(1), "random numbers", ""),
}
UNRESTORABLE = {
    "a write to a weight": "weight",
    "a write beneath a weight": "values of weights",
    "the layout of a weight": "values of weights",
}


@pytest.fixture(autouse=True)
def as_before():
    """Classes, globals and random numbers are for each case what they were."""
    global FACTOR
    before = FACTOR, Settings.shared, NUMBERS.copy(), torch.get_rng_state()
    yield
    FACTOR, Settings.shared, NUMBERS[:] = before[:3]
    torch.set_rng_state(before[3])
    if "extra" in vars(Model):
        delattr(Model, "extra")


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("policy", [Policy.STATE, Policy.GUARD])
@torch.no_grad()
def test_what_is_seen(name, policy):
    change, *told = SEEN[name]
    expected = told[policy is Policy.GUARD]
    model = Model()
    before = ModuleSnapshot(model, policy)
    assert before.retake() is before
    change(model)
    now = before.retake()
    found = before.diff(now)
    assert (expected in found) if expected else found == ""
    assert now.retake() is now
    assert now.diff(ModuleSnapshot(model, policy)) == ""


@pytest.mark.parametrize("name", [name for name, (_, state, _) in SEEN.items() if state])
@torch.no_grad()
def test_what_is_seen_is_restored(name):
    model = Model()
    before = ModuleSnapshot(model, Policy.RESTORE)
    SEEN[name][0](model)
    if name in UNRESTORABLE:
        with pytest.raises(Unrestorable, match=UNRESTORABLE[name]):
            before.restore(before.retake())
        return
    before.restore(before.retake())
    assert before.diff(ModuleSnapshot(model)) in ("", "large")  # its values are back, its version is not
    assert not model.large.any()


def test_inputs_are_restored_and_only_large_ones_need_copies():
    model, given = nn.Identity(), {"x": torch.zeros(4), "y": [torch.zeros(3000)]}
    for policy, lost in ((Policy.RESTORE, ""), (Policy.STATE, "its inputs")):
        before = ModuleSnapshot(model, policy, given)
        given["x"].add_(1)
        before.restore(before.retake())
        given["y"][0].add_(1)
        now = before.retake()
        assert before.diff(now) == "its inputs"
        if lost:
            with pytest.raises(Unrestorable, match=lost):
                before.restore(now)
        else:
            before.restore(now)
            assert not any(tensor.any() for tensor in (given["x"], *given["y"]))


def test_random_numbers_count_if_asked_for():
    before = ModuleSnapshot(nn.Identity())
    torch.rand(1)
    now = before.retake()
    assert before.diff(now).startswith("random numbers")
    assert before.diff(now, drawn=False) == ""


def test_a_guard_is_not_to_restore_from():
    model = Model()
    guard = ModuleSnapshot(model, Policy.GUARD)
    with pytest.raises(ValueError, match="no copies"):
        guard.restore(guard.retake())


@pytest.mark.parametrize(
    ("change", "grew"),
    [
        (lambda m: m.empty.update(a=1), True),
        (lambda m: m.table["b"].update(d=1), True),
        (lambda m: setattr(m, "nothing", torch.ones(1)), True),
        (lambda m: setattr(m.settings.inner, "new", 1), True),
        (lambda m: m.table.update(a=2), False),
        (lambda m: m.words.append(1), False),
        (lambda m: m.settings.names.add("c"), True),
        (lambda m: m.small.add_(1), False),
    ],
)
def test_growth_leaves_what_there_was(change, grew):
    model = Model()
    before = ModuleSnapshot(model)
    change(model)
    now = before.retake()
    assert before.diff(now)
    assert before.only_grew(now) == grew


class Slots:
    __slots__ = ("held",)


held = Slots()
held.held = 1
OPAQUE = {
    "an iterator": (itertools.count(), "thing, a count"),
    "an array": (np.zeros(2), "thing, a ndarray"),
    "a generator": (torch.Generator(), "thing, a Generator"),
    "slots": (held, "thing, a Slots"),
    "deep inside": (Settings(inner=[{"a": itertools.count()}]), "thing.inner.a, a count"),
    "an object": (Settings(by=1), ""),
    "an object of torch": (torch.distributions.Normal(0.0, 1.0), ""),
    "what a function encloses": ((lambda lock: lambda: lock)(threading.Lock()), ""),
    "steady things": ([range(3), b"", 1j, slice(1), torch.strided, torch.finfo(), int, len, ...], ""),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_cannot_be_seen_into_has_a_name(name):
    model = Model()
    model.thing, expected = OPAQUE[name]
    assert ModuleSnapshot(model, Policy.GUARD).opaque == expected


def test_what_code_has_led_to_first_is_seen_into_by_its_attribute():
    model, settings = Model(), Settings(numbers=itertools.count())
    model.before = (lambda enclosed: lambda: enclosed)(settings)
    assert ModuleSnapshot(model, Policy.GUARD).opaque == ""
    model.thing = settings
    assert ModuleSnapshot(model, Policy.GUARD).opaque == "thing.numbers, a count"
