"""Keys of calls: which calls are alike for what is decided by shape, and which for a graph."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import pytest
import torch
from torch import nn
from weight_kinds import Scaled

from meshdiff.autoshard.call_key import CallKey, call_key


class Size(IntEnum):
    SMALL = 1
    LARGE = 2


MODEL = nn.Identity()
X, Y = torch.zeros(2, 3), torch.ones(2, 3)
MODES: dict[str, Callable[[], Any]] = {
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}

# Arguments of two calls, whether plain keys are equal, and whether exact ones are.
PAIRS: dict[str, tuple[list[Any], list[Any], bool, bool]] = {
    "values": ([X], [Y], True, True),
    "shape": ([X], [torch.zeros(2, 4)], False, False),
    "dtype": ([X], [X.double()], False, False),
    "strides": ([X], [torch.zeros(3, 2).t()], True, False),
    "conjugate": ([X * 1j], [(X * 1j).conj()], True, False),
    "gradient": ([X], [torch.zeros(2, 3, requires_grad=True)], True, False),
    "device": ([X], [X.to("meta")], True, False),
    "a parameter": ([X], [nn.Parameter(X, requires_grad=False)], True, False),
    "one tensor twice": ([X, Y], [X, X], True, False),
    "another one twice": ([X, X], [Y, Y], True, True),
    "number": ([X, 1], [X, 2], True, False),
    "type of number": ([X, 1], [X, 1.0], False, False),
    "sign of zero": ([0.0], [-0.0], True, False),
    "NaN": ([float("nan")], [float("nan")], True, True),
    "flag": ([True], [False], False, False),
    "flag and number": ([True], [1], False, False),
    "none": ([None], [X], False, False),
    "word": (["a"], ["b"], False, False),
    "prompts": (["a" * 60 + "b"], ["a" * 60 + "c"], True, False),
    "word and flag": (["True"], [True], False, False),
    "dtype as argument": ([torch.float32], [torch.float16], True, False),
    "structure": ([[X, Y]], [(X, Y)], False, False),
    "structure of the same leaves": ([[X], [Y]], [[X, Y]], False, False),
    "names": ([{"a": X}], [{"b": X}], False, False),
    "members of an enum": ([Size.SMALL], [Size.LARGE], True, False),
    "any object": ([object()], [object()], True, True),
    "types of objects": ([object()], [nn.Identity()], False, False),
    "sparse": ([X.to_sparse()], [X], True, False),
}


def key(*args: Any, exact: bool = False, **kwargs: Any) -> CallKey:
    return call_key(MODEL, args, kwargs, "cpu", exact=exact)


@pytest.mark.parametrize("exact", [False, True], ids=["plain", "exact"])
@pytest.mark.parametrize("name", PAIRS)
def test_calls_are_alike_or_not(name, exact):
    first, second, *alike = PAIRS[name]
    one, other = key(*first, exact=exact), key(*second, exact=exact)
    assert (one == other) == alike[exact]
    assert len({one, other}) == 2 - alike[exact]
    assert one == key(*first, exact=exact)


@pytest.mark.parametrize("exact", [False, True])
def test_positions_and_names_of_arguments_count(exact):
    assert key(X, exact=exact) != key(hidden=X, exact=exact)
    assert key(a=X, exact=exact) != key(b=X, exact=exact)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_settings_of_torch_count(mode, exact):
    with torch.no_grad():
        without = key(X, exact=exact)
        with MODES[mode]():
            assert key(X, exact=exact) != without
        assert key(X, exact=exact) == without


@pytest.mark.parametrize("exact", [False, True])
def test_training_counts(exact):
    model = nn.Identity().eval()
    assert call_key(model, (X,), {}, "cpu", exact=exact) != key(X, exact=exact)


@pytest.mark.parametrize(
    ("leaf", "opaque"),
    [
        (X, ""),
        (nn.Parameter(X), ""),
        (1.5, ""),
        (torch.float32, ""),
        (None, ""),
        (object(), "a object, which may hold anything"),
        (torch.Generator(), "a Generator, which may hold anything"),
        (Scaled(X, X), "a Scaled, which may hold anything"),
        (X.to_sparse(), "a tensor without strides, a sparse or nested one"),
        (torch.nested.nested_tensor([X, X]), "a tensor without strides, a sparse or nested one"),
    ],
)
def test_what_is_not_all_in_an_exact_key_is_named(leaf, opaque):
    assert key(X, [leaf], exact=True).opaque == opaque
    assert key(X, [leaf]).opaque == ""


def test_shapes_are_told():
    assert key(X, 1, ["a", torch.zeros(4)], exact=True).shapes == "(2, 3), (4,)"
    assert key(X, 1, ["a", torch.zeros(4)]).shapes == "(2, 3), (4,)"
    assert key(1).shapes == ""
