"""Effects of a call other than operations on tensors, which a graph of these operations would miss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from meshdiff.autoshard.aliasing import memory
from meshdiff.autoshard.cfg.calls import Written
from meshdiff.autoshard.dispatch_mode import kind_of
from meshdiff.autoshard.op_traits import traits_of
from meshdiff.autoshard.patching import original_class
from meshdiff.autoshard.recorder import calling_line
from meshdiff.autoshard.snapshot.code_state import PLAIN_TENSORS, SMALL
from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot
from meshdiff.autoshard.snapshot.policy import Policy
from meshdiff.distributed.torch_compat import HigherOrderOperator, TorchDispatchMode, tree_leaves

__all__ = ["Watch", "note_output", "watching"]

DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Watch:
    """The first such effect that was seen; `found` is "" if there was none."""

    def __init__(self) -> None:
        self.found = ""

    def note(self, what: str) -> None:
        self.found = self.found or what


@contextmanager
def watching(module: nn.Module, arguments: Any) -> Iterator[Watch]:
    """Watch a call, which runs in the body.

    Args:
        module: the model that is called.
        arguments: what it is called with.
    """
    watch, before = Watch(), ModuleSnapshot(module)
    opaque = ModuleSnapshot(module, Policy.GUARD).opaque
    if opaque:
        watch.note(f"it has {opaque}, of which a change could not be seen")
    given = Written(arguments, by_value=True)
    _note_hidden(watch, module)
    with _Functions(watch), _Operations(watch):
        yield watch
    if given.was_written():
        watch.note("it writes to what it is given")
    what = before.diff(before.retake(), drawn=False)
    if what:
        watch.note(f"it changes {what}")


def note_output(watch: Watch, output: Any) -> None:
    """Note a part of an output that a graph could not return."""
    for leaf in tree_leaves(output):
        if type(leaf) not in PLAIN_TENSORS and type(leaf) not in SMALL:
            watch.note(f"it returns a {type(leaf).__name__}, which may hold anything")


def _note_hidden(watch: Watch, module: nn.Module) -> None:
    """Note hooks and replaced forwards of modules, whose effects are not known."""
    for name, part in module.named_modules():
        if part is not module and (part._forward_hooks or part._forward_pre_hooks):
            watch.note(f"{name} has hooks, which would not be called")
        own = vars(part).get("forward")
        if own is not None and getattr(own, "__func__", None) is not original_class(part).forward:
            watch.note(f"{name or 'it'} has a forward of its own")


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = traits_of(func).reads_values
        read = () if first is None else (args[first:], kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(read)):
            self.watch.note(f"{func.__name__} ({calling_line()}) reads values of a tensor")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self._made: dict[int, StorageWeakRef] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            self.watch.note(f"{func.name()} ({calling_line()}) is made of functions, into which nothing sees")
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").replace("_local_scalar_dense", "item")
        dependent = any(tag in func.tags for tag in DEPENDENT) or traits_of(name).reads_values is not None
        if dependent and not _takes_by_number(func, args):
            self.watch.note(f"{name} ({calling_line()}) depends on values of a tensor")
        if isinstance(kwargs.get("generator"), torch.Generator):
            self.watch.note(f"{name} ({calling_line()}) draws from a generator of its own")
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            for place in kind_of(func).written:
                written = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
                for leaf in tree_leaves(written):
                    if isinstance(leaf, Tensor) and memory(leaf)._cdata not in self._made:
                        self.watch.note(f"{name} ({calling_line()}) writes to what it has not made")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                made = memory(leaf)
                self._made.setdefault(made._cdata, StorageWeakRef(made))
        return result


def _takes_by_number(func: Any, args: Any) -> bool:
    """True if this takes rows by their numbers; by a mask, the number of rows would depend on its values."""
    return func._overloadpacket is torch.ops.aten.index and all(
        index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
    )
