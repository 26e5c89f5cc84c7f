"""What the Python of a model can read of it: to see whether a program that was captured still is the model's.

Everything that can be reached from its modules by attributes and containers
is looked at, however deep: classes, numbers and words by value, weights and
other tensors by which they are and how they lie in memory, those that consist
of other tensors (torchao) by these as well, functions by which they are. Of
what cannot be looked into (an iterator, a generator of random numbers, an
array, an object with slots) nobody could see a change, so a model that has one
has no programs.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import deque
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.autoshard.patching import KEY, Entry, original_class
from meshdiff.autoshard.snapshot.code_state import SMALL, is_library, package_of
from meshdiff.autoshard.snapshot.module_snapshot import DICTS, MEMBERS, OF_CALLS

__all__ = ["Facts"]

HOLDERS = {*DICTS, set}
HIDDEN = {*MEMBERS, KEY}
"""Attributes of a module that are looked at in another way, or are not the model's."""
PLAIN = {Tensor, nn.Parameter, nn.Buffer}

STEADY = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, types.MappingProxyType),
    *(type, enum.Enum, functools.partial, weakref.ref, range, slice, bytes, complex, type(...), type(NotImplemented)),
    *(torch.layout, torch.memory_format, torch.finfo, torch.iinfo, DeviceMesh, dist.ProcessGroup),
)
"""What does not change, or, if it does, is Python that is not looked at."""


class Facts:
    """What a model is now.

    Attributes:
        unseen: the name of something that cannot be looked into; "" if there is nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        self.unseen = ""
        self._kept: list[Any] = []  # an id says which object it is only while that lives
        self._seen: set[int] = set()
        self._parts: dict[str, Any] = {}
        self._classes: dict[type, None] = {}
        self._waiting: list[tuple[str, nn.Module]] = [("", module)]
        while self._waiting:
            name, part = self._waiting.pop()
            if id(part) not in self._seen:
                self._seen.add(id(part))
                self._kept.append(part)
                self._parts[name] = self._of_part(name, part)
        self._parts["its classes"] = {
            f"{cls.__module__}.{cls.__qualname__}": self._of_class(cls)
            for cls in {base: None for own in self._classes for base in own.__mro__}
            if not is_library(package_of(cls))
        }

    def changed(self, now: Facts) -> str:
        """The name of something that is another one in `now`; "" if there is nothing."""
        if self._parts == now._parts:
            return ""
        for name in [*self._parts, *now._parts]:
            own, other = self._parts.get(name, {}), now._parts.get(name, {})
            for key in [*own, *other]:
                if own.get(key, ...) != other.get(key, ...):
                    return f"{name}.{key}".lstrip(".")
        return "the order of its attributes"

    def _of_part(self, name: str, part: nn.Module) -> dict[str, Any]:
        # Most of what a module has are numbers, and dicts of hooks that are empty; this is to take no time.
        own = vars(part)
        facts: dict[str, Any] = {
            key: value if type(value) in SMALL and type(value) is not float else self._fact(value, f"{name}.{key}")
            for key, value in own.items()
            if (type(value) not in HOLDERS or value) and key not in HIDDEN
        }
        if not name:
            for key in OF_CALLS:
                facts.pop(key, None)
        self._classes[original_class(part)] = None
        facts["its class"] = original_class(part), *map(type, own.values())
        for members in (part._parameters, part._buffers):
            facts.update(
                {key: self._of_tensor(weight, f"{name}.{key}") for key, weight in members.items() if weight is not None}
            )
        for key, child in part._modules.items():
            facts[key] = id(child)
            if child is not None:
                self._waiting.append((f"{name}.{key}".lstrip("."), child))
        return facts

    def _of_class(self, cls: type) -> tuple[int, ...]:
        members = tuple(vars(cls).values())
        self._kept.append(members)
        return tuple(map(id, members))

    def _of_tensor(self, tensor: Tensor, name: str) -> Any:
        self._kept.append(tensor)
        if tensor.is_nested:
            return id(tensor)
        layout = tensor.stride() if tensor.layout == torch.strided else None
        facts = id(tensor), tensor.shape, layout, tensor.dtype, tensor.device, tensor.requires_grad
        if type(tensor) in PLAIN or not (held := vars(tensor)) or id(tensor) in self._seen:
            return facts
        self._seen.add(id(tensor))  # of a class whose operations run on other tensors, which it holds
        return *facts, tuple((key, self._fact(item, f"{name}.{key}")) for key, item in held.items())

    def _fact(self, value: Any, name: str) -> Any:
        kind: Any = type(value)
        if kind in SMALL:
            return kind, repr(value) if kind is float else value  # else 0.0 would be -0.0
        if isinstance(value, Tensor):
            return self._of_tensor(value, name)
        if kind is Entry:
            return self._fact(value.inner, name)
        self._kept.append(value)
        if _is_steady(kind) or id(value) in self._seen:
            return id(value)
        if isinstance(value, nn.Module):
            self._waiting.append((name.lstrip("."), value))
            return id(value)
        self._seen.add(id(value))
        inner: Any = ()
        if isinstance(value, dict):
            inner = tuple((self._fact(key, name), self._fact(item, f"{name}.{key}")) for key, item in value.items())
        elif isinstance(value, (list, tuple, deque)):
            inner = tuple(self._fact(item, name) for item in value)
        elif isinstance(value, (set, frozenset)):
            inner = frozenset(self._fact(item, name) for item in value)
        elif not _is_open(kind):
            self.unseen = self.unseen or f"{name.lstrip('.')}, a {kind.__name__}"
        held = getattr(value, "__dict__", None)
        attributes = tuple((key, self._fact(item, f"{name}.{key}")) for key, item in held.items()) if held else ()
        return id(value), kind, inner, attributes


@lru_cache(maxsize=4096)
def _is_steady(kind: type) -> bool:
    return issubclass(kind, STEADY)


@lru_cache(maxsize=4096)
def _is_open(kind: type) -> bool:
    """Whether all that an object has is in its dict: there is one, and no class of it adds slots or is made in C."""
    return all(cls.__flags__ & _HEAP and not cls.__dict__.get("__slots__") for cls in kind.__mro__[:-1])


_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
