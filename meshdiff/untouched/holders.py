"""Things that hold others: to see whether one holds what it held, and to put that back."""

from __future__ import annotations

import operator
import types
from collections import deque
from typing import Any

from meshdiff.untouched.weight_samples import SAMPLE

__all__ = ["LITTLE", "Array", "Globals", "Slots", "holds", "put_back"]

LITTLE = 1024
"""Elements of a tensor or an array of which there always is a copy: counters, averages, positions."""


class Slots:
    """What an object holds in slots."""

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


class Globals:
    """The globals of a function, of which a few names count."""

    def __init__(self, space: dict[str, Any]) -> None:
        self.space = space


def holds(holder: Any, content: Any) -> bool:
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
    if isinstance(holder, Slots):
        return holds(holder.now(), content)
    if isinstance(holder, Array):
        return bool(holder.now().tobytes() == content.tobytes())
    if isinstance(holder, Globals):
        return all(holder.space.get(name, ...) is value for name, value in content.items())
    return holder == content


def put_back(holder: Any, content: Any) -> None:
    """Let a holder hold again what it held; of a class or of globals, the names that are in `content`."""
    if isinstance(holder, types.CellType):
        holder.cell_contents = content
    elif isinstance(holder, type):
        for name, value in content.items():
            setattr(holder, name, value)
    elif isinstance(holder, Globals):
        holder.space.update(content)
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
