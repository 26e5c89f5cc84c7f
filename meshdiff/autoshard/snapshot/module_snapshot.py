"""A module as it is at one time: to see later whether it has changed, and to put it back.

Looked at is all that can be reached from its modules by attributes, containers,
objects, hooks, methods and the variables that functions enclose, and the
globals and attributes of modules and classes that the forwards name. Small
values count by value, containers by what they hold, other objects by identity,
tensors by their version as well, and weights and arrays by a few of their
values, because a write to `weight.data` leaves no other trace. Of an iterator
nobody can see how far it is: it counts as another one every time.

Not seen are changes inside of objects that are made in C, of long containers
(their length is), of objects of other packages that only a global holds, of
files and clocks.
"""

from __future__ import annotations

import copy
import itertools
import os
import types
from collections import OrderedDict, deque
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meshdiff.autoshard.patching import KEY, Entry, original_class, set_class
from meshdiff.autoshard.snapshot.code_state import (
    CONTAINERS,
    LIBRARY,
    SMALL,
    STEADY,
    Members,
    class_members,
    is_iterator,
    is_library,
    named_state,
    package_of,
    reached_functions,
    slots_of,
)
from meshdiff.autoshard.snapshot.generators import default_generators, is_array, is_generator, set_state, state_of
from meshdiff.autoshard.snapshot.holders import LITTLE, Array, Named, Slots, grew, holds, put_back
from meshdiff.autoshard.snapshot.weight_samples import WeightSamples
from meshdiff.distributed.fingerprint import fingerprint, sha256
from meshdiff.distributed.torch_compat import tree_leaves

__all__ = ["DICTS", "MEMBERS", "OF_CALLS", "RANDOM", "ModuleSnapshot", "Unrestorable", "version"]

DICTS = frozenset({dict, OrderedDict})
HOLDERS = frozenset({dict, OrderedDict, set, list})
LONGEST = 256
"""Items of a container that are looked at; longer ones are tables, of which only the length is compared."""
OF_CALLS = ("_forward_hooks", "_forward_pre_hooks")
"""Of the module itself: they run around its forward, not inside."""
OF_ALL_MODULES = ("_global_forward_hooks", "_global_forward_pre_hooks")
MEMBERS = frozenset({"_parameters", "_buffers", "_modules"})
RANDOM = "random numbers"
OF_FSDP = "__composable_api_state_key"
"""Attributes of FSDP2 in modules that it shards: they change with every call, and are nothing of the model's own."""


class Unrestorable(Exception):
    """Something was written to of which no copy was kept; the text is its name."""


class ModuleSnapshot:
    """All that can be reached of a module, as it is now.

    Args:
        module: the module.
        arguments: any structure of tensors that belongs to it.
        copies: keep the values of all buffers, tensors that are attributes, and
            tensors in `arguments`, so that writes to them can be undone, and not
            only of those that have a few elements.
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
        """Things that can be put back: dicts, lists, sets, cells and classes, and what is in them."""
        self._tensors: dict[int, tuple[str, Tensor, int]] = {}
        """Name, tensor and version."""
        self._weights: list[Tensor] = []
        self._moves = False
        """True if there is an iterator, of which nobody can see how far it is."""
        self._functions: dict[types.FunctionType, None] = {}
        self._classes: dict[type, None] = {}
        self._modules: dict[nn.Module, type] = {}
        self._waiting: list[tuple[str, nn.Module]] = []
        self._parts = self._of_all()
        self._note_random()
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor):
                self._of_tensor(tensor, "its inputs")
        self._samples = WeightSamples(self._weights)
        with torch.no_grad():
            self._copies = {
                key: tensor.clone()
                for key, (_, tensor, _) in self._tensors.items()
                if (copies or tensor.numel() <= LITTLE)
                and not isinstance(tensor, nn.Parameter)
                and not (tensor.is_quantized or tensor.is_nested)  # which torch clones in part only
            }

    def again(self) -> ModuleSnapshot:
        """The module as it is now; if nothing differs, this snapshot, which takes a third of the time of a new one."""
        same = (
            not self._moves
            and all(type(part) is cls for part, cls in self._modules.items())
            and not any(self._empty)
            and all(holds(holder, content) for holder, content in self._contents)
            and all(len(items) == length for items, length in self._long)
            and all(version(tensor) == before for _, tensor, before in self._tensors.values())
            and self._samples.still()
        )
        if not same or any(state_of(generator) != state for generator, state in self._generators):
            return ModuleSnapshot(self.module, self.arguments)
        if all(state_of(source) == state for source, state in self._random):
            return self
        now = copy.copy(self)  # random numbers were drawn, as many schedulers do between steps
        now._note_random()
        return now

    def _note_random(self) -> None:
        """The state of the generators that everything draws from by default."""
        self._random = [(source, state_of(source)) for source in default_generators()]
        self._parts = {**self._parts, RANDOM: {str(i): state for i, (_, state) in enumerate(self._random)}}

    def changed(self, now: ModuleSnapshot, drawn: bool = True) -> str:
        """The name of something that is another one in `now`, if `drawn` the default generators; "" if nothing is."""
        if now is self:
            return ""
        differing = self._differing(now, None if drawn else RANDOM) if self._parts != now._parts else ""
        if differing:
            return differing
        return self._written(now)

    def only_grew(self, now: ModuleSnapshot) -> bool:
        """True if nothing that was there is another one in `now`, as when a result is kept for later calls."""
        return grew(self._parts, now._parts) and not self._written(now)

    def restore(self, now: ModuleSnapshot) -> None:
        """Put back what differs in `now`, which was just taken.

        Raises:
            Unrestorable: if something was written to of which there is no copy; nothing is put back then.
        """
        written = self._written(now, self._copies)
        if written:
            raise Unrestorable(written)
        for holder, content in self._contents:
            if not holds(holder, content):
                put_back(holder, content)
        for holder in self._empty:
            holder.clear()
        for part, cls in self._modules.items():
            if original_class(part) is not getattr(cls, "_meshdiff_base", cls):
                set_class(part, cls)
        for source, state in (*self._generators, *self._random):
            if state_of(source) != state:
                set_state(source, state)
        differing = self._samples.differing(now._samples)
        for key, values in self._copies.items():
            _, tensor, before = self._tensors[key]
            if tensor.is_inference() or version(tensor) != before or key in differing:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.detach().copy_(values)

    def _written(self, now: ModuleSnapshot, without: Any = ()) -> str:
        """The name of a tensor that was written to, other than those."""
        for key, (name, _, before) in self._tensors.items():
            if key not in without and now._tensors.get(key, ("", None, before))[2] != before:
                return name
        return "values of weights" if self._samples.differing(now._samples) - set(without) else ""

    def _differing(self, now: ModuleSnapshot, without: str | None) -> str:
        for name in [*self._parts, *now._parts]:
            own, other = self._parts.get(name, {}), now._parts.get(name, {})
            for key in [*own, *other]:
                if own.get(key, ...) != other.get(key, ...) and name != without:
                    return f"{name}.{key}".lstrip(".")
        return ""

    def _of_all(self) -> dict[str, dict[Any, Any]]:
        parts: dict[str, dict[Any, Any]] = {}
        self._waiting.append(("", self.module))
        self._of_waiting(parts)
        for key in (*OF_CALLS, KEY):
            parts[""].pop(key, None)
        for place, own in self._of_code().items():
            parts[place] = own
        self._of_waiting(parts)
        environment: Any = vars(os.environ)["_data"]  # of which `os.environ` makes its items anew at every read
        self._contents.append((environment, dict(environment)))
        parts["os.environ"] = {key.decode(errors="replace"): value for key, value in environment.items()}
        parts["hooks of all modules"] = {
            key: self._of_attributes(getattr(nn.modules.module, key), key) for key in OF_ALL_MODULES
        }
        return parts

    def _of_waiting(self, parts: dict[str, dict[Any, Any]]) -> None:
        """Modules that were found, and those that are found in them."""
        while self._waiting:
            name, part = self._waiting.pop()
            if part in self._modules:
                continue
            self._modules[part] = type(part)
            self._classes[original_class(part)] = None
            parts[name] = self._of_module(name, part)
            for key, child in part._modules.items():
                if child is not None:
                    self._waiting.append((f"{name}.{key}", child))

    def _of_module(self, name: str, part: nn.Module) -> dict[Any, Any]:
        # Most of what a module has are dicts of hooks that are empty, and this is to take no time.
        own, facts = vars(part), dict[Any, Any]({"its class": id(original_class(part))})
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
        """Globals that forwards, hooks and processors name, and the attributes of classes and functions."""
        facts: dict[str, dict[Any, Any]] = {}
        code: dict[type, Members] = {}
        functions: set[types.FunctionType] = set()
        while True:
            for cls in [base for known in self._classes for base in known.__mro__]:
                if cls not in code:
                    code[cls] = self._of_class(cls, facts)
            reached = reached_functions(frozenset(code.values()), frozenset(self._functions))
            found = [function for function in reached if function not in functions]
            if not found:
                return facts
            for function in found:
                functions.add(function)
                self._of_names(function, facts)

    def _of_class(self, cls: type, facts: dict[str, dict[Any, Any]]) -> Members:
        code, state = class_members(cls)
        if not is_library(package_of(cls)):
            self._contents.append((cls, dict(vars(cls))))
            place = facts.setdefault(f"class {cls.__module__}.{cls.__qualname__}", {})
            place.update({key: id(value) for key, value in code})
            place.update({key: self._fact(value, f"{cls.__qualname__}.{key}") for key, value in state})
        return code

    def _of_names(self, function: types.FunctionType, facts: dict[str, dict[Any, Any]]) -> None:
        for place, holder, key in named_state(function):
            space = vars(holder) if isinstance(holder, type) else holder
            if key not in (found := facts.setdefault(place, {})):
                self._contents.append((Named(holder), {key: space[key]}))
                found[key] = self._fact(space[key], f"{place.partition(' ')[2]}.{key}")
        held = function.__dict__, function.__defaults__, function.__kwdefaults__, function.__closure__
        if any(held):
            place = f"function {function.__module__}.{function.__qualname__}"
            own = facts.setdefault(place, {})
            own[f"variables {len(own)}" if own else "variables"] = (
                self._fact(held[:3], place),
                self._of_function(function, place),
            )

    def _of_tensor(self, tensor: Tensor, name: str) -> Any:
        if tensor.is_meta:  # where a hook keeps weights elsewhere: it holds nothing
            return "meta", tensor.shape, tensor.dtype
        self._tensors[id(tensor)] = name.lstrip("."), tensor, version(tensor)
        return id(tensor), self._tensors[id(tensor)][2]

    def _fact(self, value: Any, name: str) -> Any:
        """The parts of a value that count."""
        kind: Any = type(value)
        if kind in SMALL:
            return value
        if isinstance(value, Tensor):
            self._weights.append(value)
            return self._of_tensor(value, name)
        if isinstance(value, CONTAINERS):
            own = getattr(value, "__dict__", None)  # of a class of its own
            items = self._of_container(value, name)
            return (self._of_attributes(own, name), items) if type(own) is dict else items
        if kind is Entry:
            return self._fact(value.inner, name)
        if isinstance(value, nn.Module):  # that is nobody's child: of a list, an object, a closure
            self._waiting.append((name, value))
            return id(value)
        self._kept.append(value)
        if id(value) in self._seen or isinstance(value, STEADY):
            return id(value)
        if is_generator(value):
            self._seen.add(id(value))
            self._generators.append((value, state_of(value)))
            return id(value), self._generators[-1][1]
        if package_of(kind) == LIBRARY:
            return id(value)
        self._seen.add(id(value))
        if kind is types.FunctionType:
            self._functions[value] = None
            return id(value), self._of_function(value, name)
        if kind is types.MethodType:  # a new one each time that it is read
            return self._fact(value.__self__, name), self._fact(value.__func__, name)
        if isinstance(value, partial):
            return id(value), self._fact((value.func, value.args, value.keywords), name)
        if is_array(value):
            return self._of_array(value)
        if is_iterator(value):
            self._moves = True
            return id(value), next(_times)
        slots, inner = slots_of(kind), getattr(value, "__dict__", None)
        if not slots and type(inner) is not dict:
            return id(value)
        self._classes[kind] = None
        held: Any = {}
        if type(inner) is dict:
            held = self._of_attributes(inner, name)
        if slots:
            in_slots = Slots(value, slots)
            self._contents.append((in_slots, in_slots.now()))
            held = {key: self._fact(item, f"{name}.{key}") for key, item in in_slots.now().items()} | {"": held}
        return id(value), held

    def _of_attributes(self, attributes: dict[str, Any], name: str) -> Any:
        if not attributes:
            self._empty.append(attributes)
        return self._of_container(attributes, name)

    def _of_array(self, array: Any) -> Any:
        held = Array(array)
        self._contents.append((held, held.now()))
        return id(array), array.shape, held.now().tobytes()

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


_times = itertools.count()


def version(tensor: Tensor) -> int:
    """A count of the writes to it; of what was made in inference mode, where nothing counts, a digest of the values."""
    if not tensor.is_inference():
        return tensor._version
    return 0 if isinstance(tensor, nn.Parameter) else hash(tuple(fingerprint(tensor, sha256)))
