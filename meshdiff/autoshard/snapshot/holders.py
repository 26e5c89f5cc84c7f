"""Things that hold others: to see whether one holds what it held, and to put that back."""

from __future__ import annotations

import operator
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

from meshdiff.autoshard.snapshot.weight_samples import SAMPLE

__all__ = ["LITTLE", "Array", "Named", "Slots", "grew", "holds", "put_back"]

LITTLE = 1024
"""Elements of a tensor or an array of which there always is a copy: counters, averages, positions."""


class Slots:
    """The attributes that an object holds in slots."""

    def __init__(self, owner: Any, names: tuple[str, ...]) -> None:
        self.owner, self.names = owner, names

    def now(self) -> dict[str, Any]:
        return {name: getattr(self.owner, name) for name in self.names if hasattr(self.owner, name)}


class Array:
    """The elements of an array of NumPy, or the first of them."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def now(self) -> Any:
        return self.array.copy() if self.array.size <= LITTLE else self.array.flat[:SAMPLE]


class Named:
    """The globals of a function, or a class, of which a few names count."""

    def __init__(self, owner: dict[str, Any] | type) -> None:
        self.owner = owner

    @property
    def space(self) -> Mapping[str, Any]:
        return vars(self.owner) if isinstance(self.owner, type) else self.owner

    def put_back(self, name: str, value: Any) -> None:
        if isinstance(self.owner, type):
            setattr(self.owner, name, value)
        else:
            self.owner[name] = value


def holds(holder: Any, content: Any) -> bool:
    """True if a holder holds what it held, each thing the same object."""
    if isinstance(holder, dict):
        alike = len(holder) == len(content) and all(map(operator.is_, holder, content))
        return alike and all(map(operator.is_, holder.values(), content.values()))
    if isinstance(holder, (list, deque)):
        return len(holder) == len(content) and all(map(operator.is_, holder, content))
    if isinstance(holder, types.CellType):
        try:
            return holder.cell_contents is content
        except ValueError:  # the variable was deleted
            return False
    if isinstance(holder, type):
        return holds(dict(vars(holder)), content)
    if isinstance(holder, Slots):
        return holds(holder.now(), content)
    if isinstance(holder, Array):
        return bool(holder.now().tobytes() == content.tobytes())
    if isinstance(holder, Named):
        return all(holder.space.get(name, ...) is value for name, value in content.items())
    return holder == content


def put_back(holder: Any, content: Any) -> None:
    """Let a holder hold again what it held; of `Named`, those names that are in `content`."""
    if isinstance(holder, types.CellType):
        holder.cell_contents = content
    elif isinstance(holder, type):
        for name in [name for name in vars(holder) if name not in content]:
            delattr(holder, name)
        for name, value in content.items():
            if vars(holder).get(name, ...) is not value:
                setattr(holder, name, value)
    elif isinstance(holder, Named):
        for name, value in content.items():
            if holder.space.get(name, ...) is not value:
                holder.put_back(name, value)
    elif isinstance(holder, Slots):
        for name in holder.names:
            if name in content:
                object.__setattr__(holder.owner, name, content[name])
            elif hasattr(holder.owner, name):
                delattr(holder.owner, name)
    elif isinstance(holder, Array):
        holder.array.flat[: content.size] = content.flat
    else:
        holder.clear()
        (holder.extend if isinstance(holder, (list, deque)) else holder.update)(content)


def grew(own: Any, now: Any) -> bool:
    """True if `now` has all that `own` has, unchanged; what was None may be something."""
    if own is None or own == now:
        return True
    if isinstance(own, dict) and isinstance(now, dict):
        return all(key in now and grew(fact, now[key]) for key, fact in own.items())
    alike = isinstance(own, tuple) and isinstance(now, tuple) and len(own) == len(now) > 1 and own[0] == now[0]
    return alike and all(map(grew, own[1:], now[1:]))
