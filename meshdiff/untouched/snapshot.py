"""A module as it is at one time: to see later whether it has changed, and to put it back.

Looked at is all that can be reached from its modules by attributes, containers,
objects, hooks, methods and the variables that functions enclose, and the
globals and class attributes that the forwards name. Small values count by
value, containers by what they hold, other objects by identity, tensors by their
version as well, and weights by a few of their values, because a write to
`weight.data` leaves no other trace.

Not seen are changes inside of objects with slots or made in C, of arrays of
numpy, of long containers (their length is), of objects of other packages that
only a global holds, of files and clocks.
"""

from __future__ import annotations

import copy
import operator
import random
import types
from collections import OrderedDict, deque
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from meshdiff.fingerprint import fingerprint, sha256
from meshdiff.simulation import holds_all_ranks
from meshdiff.untouched.patching import KEY, Entry, original_class
from meshdiff.untouched.weight_samples import WeightSamples

__all__ = ["DICTS", "MEMBERS", "OF_CALLS", "RANDOM", "SMALL", "ModuleSnapshot", "Unrestorable", "version"]

SMALL = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
DICTS = frozenset({dict, OrderedDict})
HOLDERS = frozenset({dict, OrderedDict, set, list})
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
LONGEST = 256
"""Items of a container that are looked at; longer ones are tables, of which only the length is compared."""
OF_CALLS = ("_forward_hooks", "_forward_pre_hooks")
"""Of the module itself: they run around its forward, not inside."""
MEMBERS = frozenset({"_parameters", "_buffers", "_modules"})
STEADY = (type, types.ModuleType, types.BuiltinFunctionType, torch.layout, torch.memory_format)
LIBRARY = "torch"
"""Code of this package keeps nothing of a model."""


RANDOM = "random numbers"
OF_FSDP = "__composable_api_state_key"
"""What FSDP2 keeps in the modules that it shards: it changes with every call, and is nothing of the model's own."""


class Unrestorable(Exception):
    """Something was written to of which no copy was kept; the text is its name."""


class ModuleSnapshot:
    """What can be reached of a module, as it is now.

    Args:
        module: the module.
        arguments: any structure of tensors that belongs to it.
        copies: keep the values of buffers, of tensors that are attributes, and of
            the tensors in `arguments`, so that writes to them can be undone.
    """

    def __init__(self, module: nn.Module, arguments: Any = (), copies: bool = False) -> None:
        self.module, self.arguments = module, arguments
        self._kept: list[Any] = []  # an id says which object it is only while that lives
        self._seen: set[int] = set()
        self._empty: list[Any] = []
        self._long: list[tuple[Any, int]] = []
        self._generators: list[tuple[torch.Generator, Any]] = []
        self._random: list[tuple[Any, Any]] = []
        self._contents: list[tuple[Any, Any]] = []
        """What can be put back: dicts, lists, sets, cells and classes, and what is in them."""
        self._tensors: dict[int, tuple[str, Tensor, int]] = {}
        """Name, tensor and version."""
        self._weights: list[Tensor] = []
        self._functions: dict[types.FunctionType, None] = {}
        self._classes: dict[type, None] = {}
        self._parts = self._of_modules(module)
        self._note_random()
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor):
                self._of_tensor(tensor, "its inputs")
        self._samples = WeightSamples(self._weights)
        self._copies: dict[int, Tensor] = {}
        if copies:
            owned = {id(weight) for weight in self._weights if isinstance(weight, nn.Parameter)}
            with torch.no_grad():
                self._copies = {
                    key: tensor.clone()
                    for key, (_, tensor, _) in self._tensors.items()
                    if key not in owned and not tensor.is_quantized  # which torch clones in part only
                }

    def again(self) -> ModuleSnapshot:
        """The module as it is now; if nothing differs, this snapshot, which takes a third of the time of a new one."""
        same = (
            not any(self._empty)
            and all(_holds(holder, content) for holder, content in self._contents)
            and all(len(items) == length for items, length in self._long)
            and all(version(tensor) == before for _, tensor, before in self._tensors.values())
            and self._samples.still()
        )
        if not same or any(_state_of(generator) != state for generator, state in self._generators):
            return ModuleSnapshot(self.module, self.arguments)
        if all(_state_of(source) == state for source, state in self._random):
            return self
        now = copy.copy(self)  # random numbers were drawn, as many schedulers do between steps
        now._note_random()
        return now

    def _note_random(self) -> None:
        """The state of the generators that everything draws from by default."""
        self._random = [(source, _state_of(source)) for source in _sources()]
        self._parts = {**self._parts, RANDOM: {str(i): state for i, (_, state) in enumerate(self._random)}}

    def changed(self, now: ModuleSnapshot, drawn: bool = True) -> str:
        """The name of something that is another one in `now`, if `drawn` the default generators; "" if nothing is."""
        if now is self:
            return ""
        differing = self._differing(now, None if drawn else RANDOM) if self._parts != now._parts else ""
        if differing:
            return differing
        return self._written(now) or ("" if self._samples.agrees(now._samples) else "values of weights")

    def only_grew(self, now: ModuleSnapshot) -> bool:
        """Whether nothing that was there is another one in `now`, as when a result is kept for later calls."""
        return _grew(self._parts, now._parts) and not self._written(now) and self._samples.agrees(now._samples)

    def restore(self, now: ModuleSnapshot) -> None:
        """Put back what differs in `now`, which was just taken.

        Raises:
            Unrestorable: if something was written to of which there is no copy; nothing is put back then.
        """
        written = self._written(now, self._copies) or (
            "" if self._samples.agrees(now._samples) else "values of weights"
        )
        if written:
            raise Unrestorable(written)
        for holder, content in self._contents:
            if not _holds(holder, content):
                _put_back(holder, content)
        for holder in self._empty:
            holder.clear()
        for source, state in (*self._generators, *self._random):
            if _state_of(source) != state:
                _set_state(source, state)
        for key, values in self._copies.items():
            _, tensor, before = self._tensors[key]
            if tensor.is_inference() or version(tensor) != before:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.detach().copy_(values)

    def _written(self, now: ModuleSnapshot, without: Any = ()) -> str:
        """The name of a tensor that was written to, other than those."""
        for key, (name, _, before) in self._tensors.items():
            if key not in without and now._tensors.get(key, ("", None, before))[2] != before:
                return name
        return ""

    def _differing(self, now: ModuleSnapshot, without: str | None) -> str:
        for name in [*self._parts, *now._parts]:
            own, other = self._parts.get(name, {}), now._parts.get(name, {})
            for key in [*own, *other]:
                if own.get(key, ...) != other.get(key, ...) and name != without:
                    return f"{name}.{key}".lstrip(".")
        return ""

    def _of_modules(self, module: nn.Module) -> dict[str, dict[Any, Any]]:
        parts: dict[str, dict[Any, Any]] = {}
        waiting, seen = [("", module)], set()
        while waiting:
            name, part = waiting.pop()
            if part in seen:
                continue
            seen.add(part)
            self._classes[original_class(part)] = None
            parts[name] = self._of_module(name, part)
            if part._modules:
                waiting += [(f"{name}.{key}", child) for key, child in part._modules.items() if child is not None]
        for key in (*OF_CALLS, KEY):
            parts[""].pop(key, None)
        self._kept += seen
        for place, own in self._of_code().items():
            parts[place] = own
        return parts

    def _of_module(self, name: str, part: nn.Module) -> dict[Any, Any]:
        # Most of what a module has are dicts of hooks that are empty, and this is to take no time.
        own, facts = vars(part), {}
        self._contents.append((own, dict(own)))
        for key, value in own.items():
            kind = type(value)
            if kind in SMALL:
                facts[key] = value
            elif kind in HOLDERS and not value:
                self._empty.append(value)
            elif key in MEMBERS:
                self._contents.append((value, dict(value)))
            elif key != KEY and not key.startswith(OF_FSDP):
                facts[key] = self._fact(value, f"{name}.{key}")
        for members in (part._parameters, part._buffers):
            for key, weight in members.items():
                if weight is not None:
                    self._weights.append(weight)
                facts[key] = None if weight is None else self._of_tensor(weight, f"{name}.{key}")
        for key, child in part._modules.items():
            facts[key] = id(child)
        return facts

    def _of_code(self) -> dict[str, dict[Any, Any]]:
        """What forwards, hooks and processors name in their globals, and the attributes of classes and functions."""
        facts: dict[str, dict[Any, Any]] = {}
        functions = dict(self._functions)
        for cls in list(self._classes):
            for base in cls.__mro__:
                if _package(base) != LIBRARY and base is not object:
                    names = [key for key, value in vars(base).items() if _is_state(key, value, _package(base))]
                    if names:
                        self._contents.append((base, {key: vars(base)[key] for key in names}))
                        facts[f"class {base.__qualname__}"] = {
                            key: self._fact(vars(base)[key], f"{base.__qualname__}.{key}") for key in names
                        }
            entry = _static(cls, "forward") or _static(cls, "__call__")
            functions |= dict.fromkeys(_functions_of(cls, entry))
        for first in list(self._functions):
            functions |= dict.fromkeys(_functions_of(object, first))
        for function in functions:
            space, package = function.__globals__, _package(function)
            own = facts.setdefault(f"module {function.__module__}", {})
            for key in _names(function.__code__):
                if key not in own and key in space and _is_state(key, space[key], package):
                    self._contents.append((_Globals(space), {key: space[key]}))
                    own[key] = self._fact(space[key], f"{function.__module__}.{key}")
            if function.__dict__ or function.__defaults__ or function.__kwdefaults__:
                held = function.__dict__, function.__defaults__, function.__kwdefaults__
                own[function.__qualname__] = self._fact(held, function.__qualname__)
        return facts

    def _of_tensor(self, tensor: Tensor, name: str) -> Any:
        if tensor.is_meta:  # where a hook keeps weights elsewhere: it holds nothing
            return "meta", tensor.shape, tensor.dtype
        self._tensors[id(tensor)] = name.lstrip("."), tensor, version(tensor)
        return id(tensor), self._tensors[id(tensor)][2]

    def _fact(self, value: Any, name: str) -> Any:
        """What counts about a value."""
        kind: Any = type(value)
        if kind in SMALL:
            return value
        if isinstance(value, Tensor):
            self._weights.append(value)
            return self._of_tensor(value, name)
        if isinstance(value, CONTAINERS):
            return self._of_container(value, name)
        if kind is Entry:
            return self._fact(value.inner, name)
        self._kept.append(value)
        if id(value) in self._seen or isinstance(value, (nn.Module, STEADY)):
            return id(value)
        if _package(kind) == LIBRARY and kind is not torch.Generator:
            return id(value)
        self._seen.add(id(value))
        if kind is types.FunctionType:
            self._functions[value] = None
            return id(value), self._of_function(value, name)
        if kind is types.MethodType:  # a new one each time that it is read
            return self._fact(value.__self__, name), self._fact(value.__func__, name)
        if isinstance(value, partial):
            return id(value), self._fact((value.func, value.args, value.keywords), name)
        if isinstance(value, torch.Generator):
            self._generators.append((value, _state_of(value)))
            return id(value), self._generators[-1][1]
        inner = getattr(value, "__dict__", None)
        if type(inner) is not dict:
            return id(value)
        self._classes[kind] = None
        if not inner:
            self._empty.append(inner)
        return id(value), self._of_container(inner, name)

    def _of_function(self, function: types.FunctionType, name: str) -> Any:
        cells = []
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a variable that is yet to be set
                continue
            self._contents.append((cell, content))
            cells.append(self._fact(content, name))
        return cells

    def _of_container(self, items: Any, name: str) -> Any:
        if len(items) > LONGEST:
            self._kept.append(items)
            self._long.append((items, len(items)))
            return id(items), len(items)
        if not isinstance(items, (tuple, frozenset)):
            if id(items) in self._seen:
                return id(items)
            self._seen.add(id(items))
            self._kept.append(items)
            self._contents.append((items, items.copy()))
        if isinstance(items, dict):
            return {key: self._fact(item, name) for key, item in items.items()}
        if isinstance(items, (list, tuple, deque)):
            return [self._fact(item, name) for item in items]
        return frozenset(item if type(item) in SMALL else id(item) for item in items)


class _Globals:
    """The globals of a function, of which a few names count."""

    def __init__(self, space: dict[str, Any]) -> None:
        self.space = space


def _holds(holder: Any, content: Any) -> bool:
    """Whether a holder holds what it held, each thing the same object."""
    if isinstance(holder, dict):
        alike = len(holder) == len(content) and all(map(operator.is_, holder, content))
        return alike and all(map(operator.is_, holder.values(), content.values()))
    if isinstance(holder, (list, deque)):
        return len(holder) == len(content) and all(map(operator.is_, holder, content))
    if isinstance(holder, types.CellType):
        return holder.cell_contents is content
    if isinstance(holder, type):
        return all(vars(holder).get(name, ...) is value for name, value in content.items())
    if isinstance(holder, _Globals):
        return all(holder.space.get(name, ...) is value for name, value in content.items())
    return holder == content


def _put_back(holder: Any, content: Any) -> None:
    if isinstance(holder, types.CellType):
        holder.cell_contents = content
    elif isinstance(holder, type):
        for name, value in content.items():
            setattr(holder, name, value)
    elif isinstance(holder, _Globals):
        holder.space.update(content)
    else:
        holder.clear()
        (holder.extend if isinstance(holder, (list, deque)) else holder.update)(content)


def _sources() -> list[Any]:
    """Generators that are everybody's: of the CPU, of this rank's GPU, and Python's own."""
    if holds_all_ranks():  # a simulation has states of its own for each rank
        return []
    on_gpu = [torch.cuda.default_generators[torch.cuda.current_device()]] if torch.cuda.is_initialized() else []
    return [torch.default_generator, *on_gpu, random]


def _state_of(source: Any) -> Any:
    return source.get_state().numpy().tobytes() if isinstance(source, torch.Generator) else source.getstate()


def _set_state(source: Any, state: Any) -> None:
    if isinstance(source, torch.Generator):
        source.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    else:
        source.setstate(state)


def _grew(own: Any, now: Any) -> bool:
    """Whether `now` has all that `own` has, unchanged; what was None may be something."""
    if own is None or own == now:
        return True
    if isinstance(own, dict) and isinstance(now, dict):
        return all(key in now and _grew(fact, now[key]) for key, fact in own.items())
    pair = isinstance(own, tuple) and isinstance(now, tuple) and len(own) == len(now) == 2
    return pair and own[0] == now[0] and isinstance(own[1], dict) and _grew(own[1], now[1])


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


def _is_state(name: str, value: Any, package: str) -> bool:
    """Whether a global or an attribute of a class may be what code of a package keeps between calls."""
    kind = type(value)
    if name.startswith("__"):
        return False
    if kind in SMALL or isinstance(value, (Tensor, *CONTAINERS)):
        return True
    inner = getattr(value, "__dict__", None)
    return (
        type(inner) is dict
        and not isinstance(value, (nn.Module, types.FunctionType, *STEADY))
        and (_package(kind) == package)
    )


@lru_cache(maxsize=4096)
def _functions_of(cls: type, forward: Any) -> tuple[types.FunctionType, ...]:
    """The forward of a class, and the functions of its package that it goes through, as far as their names tell."""
    found: dict[types.FunctionType, None] = {}
    waiting = [forward]
    while waiting:
        function = waiting.pop()
        function = (
            getattr(function, "__wrapped__", function) if not isinstance(function, types.FunctionType) else function
        )
        if not isinstance(function, types.FunctionType) or function in found or _package(function) == LIBRARY:
            continue
        found[function] = None
        waiting.append(getattr(function, "__wrapped__", None))
        for name in _names(function.__code__):
            waiting += [function.__globals__.get(name), _static(cls, name)]
    return tuple(found)


def _static(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


@lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The globals and attributes that a function reads or writes, in functions inside of it as well."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for names in inner for name in names)]))


def version(tensor: Tensor) -> int:
    """A count of the writes to it; of what was made in inference mode, where nothing counts, a digest of the values."""
    if not tensor.is_inference():
        return tensor._version
    return 0 if isinstance(tensor, nn.Parameter) else hash(tuple(fingerprint(tensor, sha256)))
