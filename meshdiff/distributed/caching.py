"""Caches for functions that always return the same result for the same arguments; compiled graphs do not use them."""

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
    """Apply `lru_cache`, except under `torch.compile`: dynamo traces through `lru_cache` and warns about it."""
    found: Any = lru_cache(maxsize=MOST)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else found(*args, **kwargs)

    return call


def lru_cache_by_mesh(function: Callable[[DeviceMesh, *Arguments], R]) -> Callable[[DeviceMesh, *Arguments], R]:
    """Do the same as `cached` for a function whose first argument is a mesh.

    Meshes over the same ranks compare equal, also those of a process group that has ended, so the cache
    compares meshes by identity.
    """

    @lru_cache(maxsize=MOST)
    def found(_which: int, mesh: DeviceMesh, arguments: tuple[*Arguments]) -> R:
        return function(mesh, *arguments)

    @wraps(function)
    def call(mesh: DeviceMesh, *arguments: *Arguments) -> R:
        return function(mesh, *arguments) if torch.compiler.is_compiling() else found(id(mesh), mesh, arguments)

    return call
