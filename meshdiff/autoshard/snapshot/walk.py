"""All that can be reached of a module: what counts of it, and what holds it."""

from __future__ import annotations

import enum
import itertools
import os
import types
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from meshdiff.autoshard.patching import KEY, Entry, original_class
from meshdiff.autoshard.snapshot.code_state import (
    CONTAINERS,
    LIBRARY,
    PLAIN_TENSORS,
    SMALL,
    Members,
    class_members,
    is_iterator,
    is_library,
    is_steady,
    named_state,
    package_of,
    reached_functions,
    slots_of,
    value_key,
)
from meshdiff.autoshard.snapshot.generators import is_array, is_generator, state_of
from meshdiff.autoshard.snapshot.holders import Array, Named, Slots, holds
from meshdiff.autoshard.snapshot.policy import Policy
from meshdiff.distributed.fingerprint import fingerprint, sha256

__all__ = ["Walk", "version"]

HOLDERS = frozenset({dict, OrderedDict, set, list})
LONGEST = 256
"""Items of a container that are compared; longer ones are tables, of which only the length is compared."""
OF_CALLS = ("_forward_hooks", "_forward_pre_hooks")
"""Of the module itself: they run around its forward, not inside."""
OF_ALL_MODULES = ("_global_forward_hooks", "_global_forward_pre_hooks")
MEMBERS = frozenset({"_parameters", "_buffers", "_modules"})
OF_FSDP = "__composable_api_state_key"
"""Attributes of FSDP2 in modules that it shards: they change with every call, and are nothing of the model's own."""


class Walk:
    """One visit of a module and of all that it reaches.

    Args:
        module: the module.
        policy: what counts.

    Attributes:
        parts: what counts, by the name of a module, class or function and of an attribute.
        contents: dicts, lists, sets, cells, classes and the like, and what is in each.
        long: the same of containers of which only the length counts.
        tensors: by id, name, tensor and what counts of it beside its values.
        weights: tensors of which a few values count as well.
        generators: with their states.
        modules: with their classes.
        opaque: the name of something of which no change could be seen, for a `GUARD`; "" if there is nothing.
    """

    def __init__(self, module: nn.Module, policy: Policy) -> None:
        self._exact = policy is Policy.GUARD
        self._dict: type[dict[Any, Any]] = OrderedDict if self._exact else dict  # OrderedDicts are equal in one order
        self._kept: list[Any] = []  # an id says which object it is only while that lives
        self._seen: dict[int, bool] = {}
        """By id, True for what only code has led to."""
        self._in_code = False
        self._empty: list[Any] = []
        self._moves = False
        """True if there is an iterator, whose position cannot be read."""
        self._globals: dict[int, dict[str, Any]] = {}
        self._functions: dict[types.FunctionType, None] = {}
        self._classes: dict[type, None] = {}
        self._waiting: list[tuple[str, nn.Module]] = [("", module)]
        self.contents: list[tuple[Any, Any]] = []
        self.long: list[tuple[Any, Any]] = []
        self.tensors: dict[int, tuple[str, Tensor, Any]] = {}
        self.weights: list[Tensor] = []
        self.generators: list[tuple[Any, Any]] = []
        self.modules: dict[nn.Module, type] = {}
        self.opaque = ""
        self.parts: dict[str, dict[Any, Any]] = {}
        self._visit_waiting()
        for key in (*OF_CALLS, KEY):
            self.parts[""].pop(key, None)
        self._in_code = True
        self._visit_code()
        self._visit_waiting()
        environment: Any = vars(os.environ)["_data"]  # of which `os.environ` makes its items anew at every read
        self.contents.append((environment, dict(environment)))
        self.parts["os.environ"] = {key.decode(errors="replace"): value for key, value in environment.items()}
        self.parts["hooks of all modules"] = {
            key: self._attributes(getattr(nn.modules.module, key), key) for key in OF_ALL_MODULES
        }

    def is_current(self) -> bool:
        """True if all is as it was, each thing the same object; it takes a third of the time of another visit."""
        return (
            not self._moves
            and all(type(part) is cls for part, cls in self.modules.items())
            and not any(self._empty)
            and all(holds(holder, content) for holder, content in self.contents)
            and all(len(items) == len(content) for items, content in self.long)
            and all(self._stamp(tensor) == before for _, tensor, before in self.tensors.values())
            and all(state_of(generator) == state for generator, state in self.generators)
        )

    def empty_again(self) -> None:
        """Empty what was empty."""
        for holder in self._empty:
            holder.clear()

    def add_tensor(self, tensor: Tensor, name: str) -> Any:
        """Note a tensor; return what counts of it: its identity, and its version or its layout."""
        if tensor.is_meta and not self._exact:  # where a hook keeps weights elsewhere: it holds nothing
            return "meta", tensor.shape, tensor.dtype
        stamp = self._stamp(tensor)
        self.tensors[id(tensor)] = name.lstrip("."), tensor, stamp
        if self._exact and type(tensor) not in PLAIN_TENSORS and vars(tensor) and self._is_new(tensor):
            # Of a class whose operations run on other tensors, which it holds.
            return id(tensor), stamp, self._attributes(vars(tensor), name)
        return id(tensor), stamp

    def _stamp(self, tensor: Tensor) -> Any:
        if not self._exact:
            return version(tensor)
        if tensor.is_nested:
            return ()
        strides = tensor.stride() if tensor.layout == torch.strided else None
        return tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad

    def _visit_waiting(self) -> None:
        """Modules that were found, and those that are found in them."""
        while self._waiting:
            name, part = self._waiting.pop()
            if part in self.modules:
                continue
            self.modules[part] = type(part)
            self._classes[original_class(part)] = None
            self.parts[name] = self._module(name, part)
            for key, child in part._modules.items():
                if child is not None:
                    self._waiting.append((f"{name}.{key}", child))

    def _module(self, name: str, part: nn.Module) -> dict[Any, Any]:
        # Most of what a module has are dicts of hooks that are empty, and this is to take no time.
        own, facts = vars(part), self._dict({"its class": id(original_class(part))})
        self.contents.append((own, dict(own)))
        for key, value in own.items():
            kind = type(value)
            if kind in SMALL:
                facts[key] = value_key(value)
            elif kind in HOLDERS and not value:
                self._empty.append(value)
                if self._exact:
                    facts[key] = kind
            elif key in MEMBERS:
                self.contents.append((value, dict(value)))
            elif key != KEY and (self._exact or not key.startswith(OF_FSDP)):
                facts[key] = self._fact(value, f"{name}.{key}")
        for members in (part._parameters, part._buffers):
            for key, weight in members.items():
                if weight is not None:
                    self.weights.append(weight)
                facts[key] = None if weight is None else self.add_tensor(weight, f"{name}.{key}")
        for key, child in part._modules.items():
            facts[key] = id(child)
        return facts

    def _visit_code(self) -> None:
        """Globals that forwards, hooks and processors name, and the attributes of classes and functions."""
        code: dict[type, Members] = {}
        functions: set[types.FunctionType] = set()
        while True:
            for cls in [base for known in self._classes for base in known.__mro__]:
                if cls not in code:
                    code[cls] = self._class(cls)
            reached = reached_functions(frozenset(code.values()), frozenset(self._functions))
            found = [function for function in reached if function not in functions]
            if not found:
                return
            for function in found:
                functions.add(function)
                self._names(function)

    def _class(self, cls: type) -> Members:
        code, state = class_members(cls)
        if not is_library(package_of(cls)):
            self.contents.append((cls, dict(vars(cls))))
            place = self.parts.setdefault(f"class {cls.__module__}.{cls.__qualname__}", {})
            place.update({key: id(value) for key, value in (vars(cls).items() if self._exact else code)})
            place.update({key: self._fact(value, f"{cls.__qualname__}.{key}") for key, value in state})
        return code

    def _names(self, function: types.FunctionType) -> None:
        for place, holder, key in named_state(function):
            space = vars(holder) if isinstance(holder, type) else holder
            if key not in (found := self.parts.setdefault(place, {})):
                if id(holder) not in self._globals:
                    self.contents.append((Named(holder), self._globals.setdefault(id(holder), {})))
                self._globals[id(holder)][key] = space[key]
                found[key] = self._fact(space[key], f"{place.partition(' ')[2]}.{key}")
        held = function.__dict__, function.__defaults__, function.__kwdefaults__, function.__closure__
        if any(held):
            place = f"function {function.__module__}.{function.__qualname__}"
            own = self.parts.setdefault(place, {})
            own[f"variables {len(own)}" if own else "variables"] = (
                self._fact(held[:3], place),
                self._variables(function, place),
            )

    def _fact(self, value: Any, name: str) -> Any:
        """The parts of a value that count."""
        kind: Any = type(value)
        if kind in SMALL:
            return value_key(value)
        if isinstance(value, Tensor):
            self.weights.append(value)
            return self.add_tensor(value, name)
        if isinstance(value, CONTAINERS):
            own = getattr(value, "__dict__", None)  # of a class of its own
            items = self._container(value, name)
            return (self._attributes(own, name), items) if type(own) is dict else items
        if kind is Entry:
            return self._fact(value.inner, name)
        if isinstance(value, nn.Module):  # that is nobody's child: of a list, an object, a closure
            self._waiting.append((name, value))
            return id(value)
        self._kept.append(value)
        if is_steady(kind):
            return id(value)
        if kind is types.MethodType:  # a new one each time that it is read
            with self._of_code():
                return self._fact(value.__self__, name), self._fact(value.__func__, name)
        if not self._is_new(value):
            return id(value)
        if self._exact and not self._in_code and not _is_open(kind):
            self.opaque = self.opaque or f"{name.lstrip('.')}, a {kind.__name__}"
        if is_generator(value):
            return id(value), self._generator(value)
        if package_of(kind) == LIBRARY and not self._exact:
            return id(value)
        if kind is types.FunctionType:
            self._functions[value] = None
            with self._of_code():
                return id(value), self._variables(value, name)
        if isinstance(value, partial):
            with self._of_code():
                return id(value), self._fact((value.func, value.args, value.keywords), name)
        if is_array(value):
            return self._array(value)
        if is_iterator(value):
            self._moves = True
            return id(value), next(_times)
        return self._object(value, name)

    def _object(self, value: Any, name: str) -> Any:
        kind: Any = type(value)
        slots, inner = slots_of(kind), getattr(value, "__dict__", None)
        if not slots and type(inner) is not dict:
            return id(value)
        self._classes[kind] = None
        held: Any = {}
        if type(inner) is dict:
            held = self._attributes(inner, name)
        if slots:
            in_slots = Slots(value, slots)
            self.contents.append((in_slots, in_slots.now()))
            held = {key: self._fact(item, f"{name}.{key}") for key, item in in_slots.now().items()} | {"": held}
        return id(value), held

    def _attributes(self, attributes: dict[str, Any], name: str) -> Any:
        if not attributes:
            self._empty.append(attributes)
        return self._container(attributes, name)

    def _array(self, array: Any) -> Any:
        held = Array(array)
        self.contents.append((held, held.now()))
        return id(array), array.shape, held.now().tobytes()

    def _generator(self, generator: Any) -> Any:
        if self._exact:
            return None
        self.generators.append((generator, state_of(generator)))
        return self.generators[-1][1]

    def _variables(self, function: types.FunctionType, name: str) -> Any:
        cells = []
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a variable that is yet to be set
                continue
            self.contents.append((cell, content))
            cells.append(self._fact(content, name))
        return cells

    def _container(self, items: Any, name: str) -> Any:
        kind = type(items)
        if len(items) > LONGEST and not self._exact:
            self._kept.append(items)
            self.long.append((items, items if isinstance(items, (tuple, frozenset)) else items.copy()))
            return id(items), len(items)
        if not isinstance(items, (tuple, frozenset)):
            if not self._is_new(items):
                return id(items)
            self._kept.append(items)
            self.contents.append((items, items.copy()))
        if isinstance(items, dict):
            return kind, self._dict(
                (key, self._fact(item, f"{name}.{key}"))
                if type(key) is str
                else (value_key(key), (self._fact(key, name), self._fact(item, name)))
                for key, item in items.items()
            )
        if isinstance(items, (list, tuple, deque)):
            return kind, [self._fact(item, name) for item in items]
        return kind, {value_key(item) if type(item) in SMALL else id(item): self._fact(item, name) for item in items}

    def _is_new(self, value: Any) -> bool:
        """True if it was not visited yet; by an attribute it is once more, for `opaque` is of attributes alone."""
        if self._seen.get(id(value)) in (False, self._in_code):
            return False
        self._seen[id(value)] = self._in_code
        return True

    @contextmanager
    def _of_code(self) -> Iterator[None]:
        """Mark values that are visited in the body as reached through code."""
        before, self._in_code = self._in_code, True
        yield
        self._in_code = before


_times = itertools.count()


@lru_cache(maxsize=4096)
def _is_open(kind: type) -> bool:
    """True if all that an object has is in its dict: there is one, and no class of it adds slots or is made in C."""
    if issubclass(kind, (types.FunctionType, partial, enum.Enum)):
        return True
    return all(cls.__flags__ & _HEAP and not cls.__dict__.get("__slots__") for cls in kind.__mro__[:-1])


_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def version(tensor: Tensor) -> int:
    """A count of the writes to it; of what was made in inference mode, where nothing counts, a digest of the values."""
    if not tensor.is_inference():
        return tensor._version
    return 0 if isinstance(tensor, nn.Parameter) else hash(tuple(fingerprint(tensor, sha256)))
