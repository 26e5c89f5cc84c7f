"""The table of what is true of operations."""

from __future__ import annotations

import importlib
import pkgutil

import torch
from torch import Tensor

from meshdiff.autoshard import ops
from meshdiff.autoshard.function_mode import HANDLERS
from meshdiff.autoshard.op_traits import NONE, TRAITS, traits_of

FUNCTIONS = {key: traits for key, traits in TRAITS.items() if not isinstance(key, str)}
OPERATIONS = {key: traits for key, traits in TRAITS.items() if isinstance(key, str)}


def test_every_operation_is_one_of_torch():
    assert [name for name in OPERATIONS if not hasattr(torch.ops.aten, name)] == []


def test_handlers_of_every_file_are_in_use():
    for file in pkgutil.iter_modules(ops.__path__):
        own = getattr(importlib.import_module(f"{ops.__name__}.{file.name}"), "HANDLERS", {})
        assert own.items() <= HANDLERS.items(), f"meshdiff/autoshard/function_mode.py does not merge ops/{file.name}.py"


def test_traits_of_handlers_belong_to_functions_that_have_one():
    assert [key for key, traits in FUNCTIONS.items() if traits.lazy_aware and key not in HANDLERS] == []
    assert [key for key, traits in FUNCTIONS.items() if traits.cached_handler and key not in HANDLERS] == []


def test_traits_that_rule_each_other_out():
    for key, traits in TRAITS.items():
        assert not (traits.shard_safe and traits.safe_unless_dim), key
        assert not (traits.reshapes and not traits.view), key
        assert not (traits.cacheable and (traits.storage_access or traits.metadata)), key
        assert not (traits.cached_handler and not traits.cacheable), key


def test_what_is_not_in_the_table_has_no_traits():
    assert traits_of(torch.linalg.svd) == traits_of("no_such_operation") == NONE
    assert traits_of(Tensor.add).pointwise
    assert traits_of("topk").safe_unless_dim.place == 2
