"""Results that are kept, of functions that say the same every time; graphs that are compiled do without."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["cached", "lru_cache_by_mesh"]

P = ParamSpec("P")
Arguments = TypeVarTuple("Arguments")
R = TypeVar("R")

MOST = 4096


def cached(function: Callable[P, R]) -> Callable[P, R]:
    """`lru_cache`, which dynamo traces through and warns of."""
    found: Any = lru_cache(maxsize=MOST)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else found(*args, **kwargs)

    return call


def lru_cache_by_mesh(function: Callable[[DeviceMesh, *Arguments], R]) -> Callable[[DeviceMesh, *Arguments], R]:
    """The same for a function of a mesh and more.

    Meshes over the same ranks are equal to each other, those of a process group that has ended too, so
    it goes by which mesh it is.
    """

    @lru_cache(maxsize=MOST)
    def found(_which: int, mesh: DeviceMesh, arguments: tuple[*Arguments]) -> R:
        return function(mesh, *arguments)

    @wraps(function)
    def call(mesh: DeviceMesh, *arguments: *Arguments) -> R:
        return function(mesh, *arguments) if torch.compiler.is_compiling() else found(id(mesh), mesh, arguments)

    return call
