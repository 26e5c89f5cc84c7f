"""State that no module holds but the code of its forward names: globals, and attributes of modules and of classes."""

from __future__ import annotations

import io
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.autoshard.snapshot.generators import is_array, is_generator

__all__ = [
    "CONTAINERS",
    "LIBRARY",
    "PLAIN_TENSORS",
    "SMALL",
    "Members",
    "class_members",
    "is_code",
    "is_iterator",
    "is_library",
    "is_steady",
    "named_state",
    "package_of",
    "reached_functions",
    "slots_of",
    "value_key",
]

SMALL = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
PLAIN_TENSORS = frozenset({Tensor, nn.Parameter, nn.Buffer})
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
STEADY = (
    *(type, types.ModuleType, types.BuiltinFunctionType, types.MappingProxyType, weakref.ref),
    *(range, slice, bytes, complex, type(...), type(NotImplemented)),
    *(torch.layout, torch.memory_format, torch.finfo, torch.iinfo, DeviceMesh, dist.ProcessGroup),
)
CODE = (types.FunctionType, types.BuiltinFunctionType, property, staticmethod, classmethod)
OPEN = (types.SimpleNamespace, threading.local)
"""Objects of the standard library that hold what somebody else puts there."""
LIBRARY = "torch"
"""Code of this package keeps nothing of a model."""


def value_key(value: Any) -> Any:
    """A key of a small value: those of 1, 1.0 and True differ, and those of 0.0 and -0.0; those of two NaN do not."""
    kind = type(value)
    if kind is float:
        return kind, repr(value)
    return (kind, value) if kind is bool else value


def package_of(thing: Any) -> str:
    """The name of the package that a class or a function is from."""
    return str(thing.__module__).partition(".")[0]


@lru_cache(maxsize=4096)
def is_steady(kind: type) -> bool:
    """True if an object of a type does not change, or, if it does, holds nothing of a model."""
    return issubclass(kind, STEADY)


def is_iterator(value: Any) -> bool:
    """True if reading it moves it on; its position cannot be read."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)


Members = tuple[tuple[str, Any], ...]


def class_members(cls: type) -> tuple[Members, Members]:
    """Of a class itself, what is code, and what code may keep something in; nothing of a library's."""
    package = package_of(cls)
    if is_library(package):
        return (), ()
    own = vars(cls).items()
    code = tuple((name, value) for name, value in own if is_code(value))
    return code, tuple((name, value) for name, value in own if _is_state(name, value, package) and not is_code(value))


def is_code(value: Any) -> bool:
    """True if an attribute of a class or a module is a function, or is made of some."""
    return isinstance(value, CODE)


def named_state(function: types.FunctionType) -> Iterator[tuple[str, Any, str]]:
    """The globals that a function names, and what it names of the modules and classes that are among them.

    Returns:
        the name of what holds it, the dict of globals or the class that does, and the name that it has there.
    """
    names = _names(function.__code__)
    for place, holder, package in _spaces(function, names):
        space = vars(holder) if isinstance(holder, type) else holder
        for key in names:
            if key in space and (is_code(space[key]) or (package != LIBRARY and _is_state(key, space[key], package))):
                yield place, holder, key


def _spaces(function: types.FunctionType, names: tuple[str, ...]) -> Iterator[tuple[str, Any, str]]:
    space = function.__globals__
    yield f"module {function.__module__}", space, package_of(function)
    for name in names:
        value = _global(space, name)
        if isinstance(value, types.ModuleType):
            package = value.__name__.partition(".")[0]
            if package == LIBRARY or not is_library(package):
                yield f"module {value.__name__}", vars(value), package
        elif isinstance(value, type) and not is_library(package_of(value)):
            yield f"class {value.__qualname__}", value, package_of(value)


def _global(space: dict[str, Any], name: str) -> Any:
    """The global that a function finds by a name, or imports by it."""
    if name in space:
        return space[name]
    return sys.modules.get(name) or sys.modules.get(f"{space.get('__package__')}.{name}")


@lru_cache(maxsize=1024)
def is_library(package: str) -> bool:
    return package == LIBRARY or package in sys.stdlib_module_names


def _is_state(name: str, value: Any, package: str) -> bool:
    """True if a global or an attribute of a class may be what code of a package keeps between calls."""
    kind: Any = type(value)
    if name.startswith("__"):
        return False
    if kind in SMALL or isinstance(value, (Tensor, nn.Module, *CONTAINERS)):
        return True
    if kind is types.FunctionType or is_steady(kind):
        return False
    if is_array(value) or is_generator(value) or isinstance(value, OPEN) or is_iterator(value):
        return True
    return (type(getattr(value, "__dict__", None)) is dict or slots_of(kind) != ()) and package_of(kind) == package


@lru_cache(maxsize=4096)
def slots_of(kind: type) -> tuple[str, ...]:
    """The attributes of an object that are in no dict; those of the standard library keep what they found out there."""
    found: dict[str, None] = {}
    for cls in kind.__mro__:
        if not is_library(package_of(cls)):
            slots = vars(cls).get("__slots__", ())
            found |= dict.fromkeys((slots,) if isinstance(slots, str) else slots)
    return tuple(name for name in found if isinstance(getattr(kind, name, None), types.MemberDescriptorType))


@lru_cache(maxsize=256)
def reached_functions(members: frozenset[Members], functions: frozenset[Any]) -> tuple[types.FunctionType, ...]:
    """The forwards of classes, other functions, and all that these may call, found by their names.

    A name may be that of a global, of a function of a module or class that is a global, or of a method of any class.

    Args:
        members: the code of each class.
        functions: others to begin with.
    """
    methods: dict[str, list[Any]] = {}
    for of_class in members:
        for name, value in of_class:
            methods.setdefault(name, []).extend(_functions_in(value))
    found: dict[types.FunctionType, None] = {}
    waiting = [*functions, *methods.get("forward", ()), *methods.get("__call__", ())]
    while waiting:
        for function in _functions_in(waiting.pop()):
            if function in found or is_library(package_of(function)):
                continue
            found[function] = None
            names = _names(function.__code__)
            waiting.append(getattr(function, "__wrapped__", None))
            for _, holder, _ in _spaces(function, names):
                space = vars(holder) if isinstance(holder, type) else holder
                waiting += [space[name] for name in names if name in space]
            waiting += [method for name in names for method in methods.get(name, ())]
    return tuple(found)


def _functions_in(value: Any) -> list[types.FunctionType]:
    """The functions that an attribute of a class is made of."""
    parts = (value.fget, value.fset) if isinstance(value, property) else (getattr(value, "__func__", value),)
    plain = [part if isinstance(part, types.FunctionType) else getattr(part, "__wrapped__", None) for part in parts]
    return [part for part in plain if isinstance(part, types.FunctionType)]


@lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The globals and attributes that a function reads or writes, in functions inside of it as well."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for names in inner for name in names)]))
