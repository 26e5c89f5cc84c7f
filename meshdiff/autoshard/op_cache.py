"""A cache of DTensor's decisions about operations, to repeat an operation without DTensor's dispatch.

To unpack operands, decide about placements and divide replicated operands costs
DTensor as much as thousands of multiplications, each time. The operations here
need nothing of other ranks; the form of a result depends on the function, the
shapes and placements of its operands, and its other arguments. The first time
DTensor gives the shape, stride and placement of the result. When the operation
is repeated, there is little more to do than making that DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from meshdiff.attention.problem import chunk_ranges
from meshdiff.autoshard.aliasing import memory
from meshdiff.autoshard.dtensor_utils import LEAVES, sharded_dim
from meshdiff.autoshard.op_traits import traits_of
from meshdiff.distributed.local_shards import of_spec, place_on
from meshdiff.distributed.simulation import on_each_rank
from meshdiff.distributed.torch_compat import DisableTorchDispatch, DTensorSpec, dispatch_depth, tree_map_only

__all__ = [
    "CachedOutput",
    "DispatchCache",
    "Key",
    "cache_key",
    "run_on_shards",
    "unseen",
]

PLAIN = {Tensor, Parameter}
"""Classes of tensors whose operations only torch itself decides."""

MOST = 4096

Key = tuple[Any, ...]


@dataclass(frozen=True)
class CachedOutput:
    """The form of a result: one DTensor, or several in a tuple or list; none if it is the first operand itself."""

    specs: tuple[DTensorSpec, ...]
    several: type | None
    divided: tuple[int | None, ...]
    """For each operand, the dim along which a rank takes its rows of it; None to take all; empty if all are None."""
    rows: tuple[int, int, int, int] = (0, 0, 1, 0)
    """The sharded dim of the first result, its length, the number of ranks and the number of this rank."""
    is_plain: bool = True
    """True if no operand is of a tensor class of its own, which may decide about the operation: see `PLAIN`."""

    def replay(self, func: Any, args: Any, kwargs: Any, unguarded: Callable[[], AbstractContextManager[None]]) -> Any:
        """The result, for operands of the same key; nothing is sent."""
        if not self.specs:
            return args[0]
        own, is_plain = list(args), self.is_plain
        for i, arg in enumerate(args):
            if type(arg) is DTensor:
                own[i] = arg.to_local()
                is_plain = is_plain and type(own[i]) is Tensor
        if is_plain and _is_guarded_only():
            with DisableTorchDispatch():
                made = self._of_own(func, own, kwargs)
        else:
            with unguarded():
                made = self._of_own(func, own, kwargs)
        if self.several is None:
            return of_spec(made, self.specs[0])
        return self.several(map(of_spec, made, self.specs))

    def _of_own(self, func: Any, own: list[Any], kwargs: Any) -> Any:
        if traits_of(func).reshapes:
            return _reshaped(own[0], self.specs[0].shape, *self.rows)
        if self.divided:
            return _on_own_rows(func, kwargs, self.divided, *self.rows, *own)
        return run_on_shards(func, kwargs, *own)


def _is_guarded_only() -> bool:
    """True if the guard is the only dispatch mode: there is no counter of FLOPs, say, as well.

    The guard need not see operations that are known; to run it takes longer than most operations.
    """
    return dispatch_depth() == 1


def unseen(func: Any, *args: Any) -> Any:
    """Run a cacheable function of replicated tensors, which the guard need not see."""
    if _is_guarded_only() and all(type(arg) in PLAIN for arg in args if isinstance(arg, Tensor)):
        with DisableTorchDispatch():
            return func(*args)
    return func(*args)


class DispatchCache:
    """The results of operations, by what decides them, of one model on one mesh."""

    def __init__(self) -> None:
        self._results: dict[Key, CachedOutput | None] = {}
        self._outlines: dict[Key, list[Tensor]] = {}
        self._joined: dict[Key, Any] = {}

    def get(self, key: Key) -> CachedOutput | None:
        return self._results.get(key)

    def insert(self, key: Key, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keep the result of DTensor for an operation; None for an operation that DTensor has to run every time."""
        if key not in self._results:
            _make_room(self._results)
            self._results[key] = _cached(func, args, kwargs, result)

    def get_joined(self, key: Key) -> Any:
        """The same for functions of rows that are joined, see `ops.concat`."""
        return self._joined.get(key)

    def insert_joined(self, key: Key, known: Any) -> None:
        _make_room(self._joined)
        self._joined[key] = known

    def outlines(self, func: Any, args: Any, kwargs: Any) -> list[Tensor] | None:
        """The results on one device, of full tensors, without the values: shapes and strides; None if not known."""
        key = cache_key(func, args, kwargs)
        if key is None or "out" in kwargs:
            return None
        if key not in self._outlines:
            own_args, own_kwargs = tree_map_only(Tensor, _outline, (args, kwargs))
            result = func(*own_args, **own_kwargs)
            _make_room(self._outlines)
            self._outlines[key] = list(result) if isinstance(result, (tuple, list)) else [result]
        return self._outlines[key]


def _make_room(found: dict[Key, Any]) -> None:
    if len(found) >= MOST:
        found.clear()


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def cache_key(func: Any, args: Any, kwargs: Any) -> Key | None:
    """A function and all that decides the shape, stride, dtype and placement of its result; None if it has no key."""
    parts: list[Any] = [func, torch.get_default_dtype(), len(args), *kwargs]
    try:
        return tuple(parts) if _describe(args, parts) and _describe(kwargs.values(), parts) else None
    except RuntimeError:  # of a sparse or nested tensor, which has no strides
        return None


def _describe(values: Iterable[Any], parts: list[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is DTensor:
            parts.append(value._spec)
        elif isinstance(value, Tensor):
            parts.append((kind, value.shape, value.stride(), value.dtype, value.device))
        elif kind is float or kind is complex:
            parts.append(kind)  # its value decides nothing
        elif kind is tuple or kind is list or kind is torch.Size:
            parts.append((kind, len(value)))
            if not _describe(value, parts):
                return False
        elif kind is slice:
            if not _describe((value.start, value.stop, value.step), parts):
                return False
        elif kind in LEAVES:
            parts.append((kind, value))
        else:
            return False
    return True


def _cached(func: Any, args: Any, kwargs: Any, result: Any) -> CachedOutput | None:
    if not args or not _is_cacheable(func, args, kwargs):
        return None
    if result is args[0]:
        return CachedOutput((), None, ())
    several = type(result) if type(result) in (tuple, list) else None
    results = result if several is not None else [result]
    if not results or not all(type(one) is DTensor and type(one.placements[0]) is Shard for one in results):
        return None
    specs, rows = tuple(one._spec for one in results), _rows(results[0]._spec)
    is_plain = all(
        type(tensor) in (*PLAIN, DTensor) for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor)
    )
    if traits_of(func).view:
        if any(memory(one)._cdata != memory(args[0])._cdata for one in results):
            return None  # a copy, of which somebody has to be told
        return CachedOutput(specs, several, (), rows, is_plain)
    if traits_of(func).rowwise:
        return CachedOutput(specs, several, (), rows, is_plain) if sharded_dim(args[0]) is not None else None
    dim, length, *_ = rows
    for arg in args:
        if isinstance(arg, DTensor) and not arg.placements[0].is_replicate():
            own = sharded_dim(arg)
            if own is None or own - arg.ndim != dim - results[0].ndim or arg.shape[own] != length:
                return None
    divided = tuple(_dim_to_divide(arg, dim - results[0].ndim, length) for arg in args)
    return CachedOutput(specs, several, divided if any(own is not None for own in divided) else (), rows, is_plain)


def _is_cacheable(func: Any, args: Any, kwargs: Any) -> bool:
    """True if it writes to nothing, and does to a rank's rows what it does to all rows."""
    traits = traits_of(func)
    if traits.writes_if_asked:
        return not any(args[1:]) and not any(kwargs.values())
    if func is F.dropout:  # of which a number decides whether it does anything
        return kwargs.get("training", args[2] if len(args) > 2 else True) is False
    if kwargs and traits.view:
        return False
    if traits.reshapes and any(isinstance(arg, torch.dtype) for arg in args):  # a view of the bits
        return False
    return not any(isinstance(value, DTensor if traits.rowwise else Tensor) for value in kwargs.values())


def _rows(spec: DTensorSpec) -> tuple[int, int, int, int]:
    """The sharded dim, its length, the number of ranks and the number of this rank."""
    placement = spec.placements[0]
    assert isinstance(placement, Shard)
    return placement.dim, spec.shape[placement.dim], *place_on(spec.mesh)


def _dim_to_divide(arg: Any, dim: int, length: int) -> int | None:
    """The dim along which a rank takes rows of a replicated operand; None to take all. `dim` counts from the end."""
    if not isinstance(arg, Tensor) or sharded_dim(arg) is not None or arg.ndim < -dim or arg.shape[dim] != length:
        return None
    return None if length == 1 else dim


@on_each_rank
def run_on_shards(func: Any, kwargs: dict[str, Any], *own: Any) -> Any:
    result = func(*own, **kwargs)
    return tuple(result) if isinstance(result, list) else result


@on_each_rank
def _on_own_rows(
    func: Any,
    kwargs: dict[str, Any],
    divided: Sequence[int | None],
    _dim: int,
    length: int,
    ranks: int,
    rank: int,
    *own: Any,
) -> Tensor:
    rows = chunk_ranges(length, ranks)[rank]
    parts = [
        arg if dim is None else arg.narrow(dim, rows.start, len(rows)) for arg, dim in zip(own, divided, strict=True)
    ]
    return func(*parts, **kwargs)


@on_each_rank
def _reshaped(tensor: Tensor, shape: torch.Size, dim: int, length: int, ranks: int, rank: int) -> Tensor:
    return tensor.view(*shape[:dim], len(chunk_ranges(length, ranks)[rank]), *shape[dim + 1 :])
