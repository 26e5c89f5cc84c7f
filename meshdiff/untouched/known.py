"""What DTensor has found out once about an operation, done again without asking it.

To take operands apart, decide about placements and divide what is whole costs
DTensor as much as thousands of multiplications, each time. The operations here
need nothing of other ranks; what comes of one is decided by the function, the
shapes and placements of its operands, and its other arguments: the first time
DTensor says of what shape, stride and placement the result is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.utils._pytree import tree_map_only

from meshdiff.attention.problem import chunk_ranges
from meshdiff.simulation import on_each_rank
from meshdiff.untouched.aliases import memory
from meshdiff.untouched.tensors import LEAVES, sharded_dim

__all__ = ["POINTWISE", "RESHAPES", "Key", "Known", "Result"]

_NAMES = ("add", "sub", "mul", "div", "neg", "abs", "pow", "exp", "sin", "cos", "tanh", "sigmoid", "sqrt", "rsqrt")
POINTWISE = {getattr(where, name) for where in (torch, Tensor) for name in _NAMES}
POINTWISE |= {torch.where, F.gelu, Tensor.float, Tensor.type_as, Tensor.to}
WRITES_IF_ASKED = {F.silu, F.relu}
RESHAPES = {Tensor.unflatten, Tensor.view, Tensor.reshape, torch.reshape, Tensor.unsqueeze, torch.unsqueeze,
            Tensor.flatten, torch.flatten, Tensor.squeeze, torch.squeeze}  # fmt: skip
REORDERS = {Tensor.permute, Tensor.transpose, torch.permute, torch.transpose, Tensor.unbind, torch.unbind,
            Tensor.chunk, torch.chunk, Tensor.split, torch.split}  # fmt: skip
MOST = 4096

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Result:
    """What comes of an operation: one DTensor, or several of a tuple or list."""

    specs: tuple[DTensorSpec, ...]
    several: type | None
    divided: tuple[int | None, ...]
    """Of each operand that is whole, the dim of which a rank takes its rows."""

    def again(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result, for operands of the same key; nothing is sent."""
        spec = self.specs[0]
        own = [arg.to_local() if isinstance(arg, DTensor) else arg for arg in args]
        if func in RESHAPES:
            made: Any = _reshaped(own[0], spec.shape, *_rows(spec))
        elif any(dim is not None for dim in self.divided):
            made = _on_own_rows(func, kwargs, self.divided, *_rows(spec), *own)
        else:
            made = _on_shards(func, kwargs, *own)
        if self.several is None:
            return DTensor(made, spec, requires_grad=False)
        return self.several(DTensor(part, one, requires_grad=False) for part, one in zip(made, self.specs, strict=True))


class Known:
    """The results of operations, by what decides them, of one model on one mesh."""

    def __init__(self) -> None:
        self._results: dict[Key, Result | None] = {}
        self._outlines: dict[Key, list[Tensor]] = {}

    def get(self, key: Key) -> Result | None:
        return self._results.get(key)

    def learn(self, key: Key, func: Any, args: Any, result: Any) -> None:
        """Keep what DTensor has made of an operation; None for what it is to be asked about every time."""
        if key not in self._results:
            _make_room(self._results)
            self._results[key] = _learnt(func, args, result)

    def outlines(self, func: Any, args: Any, kwargs: Any) -> list[Tensor] | None:
        """What one device would make of whole tensors, without the values: shapes and strides; None if not known."""
        key = described(func, args, kwargs)
        if key is None:
            return None
        if key not in self._outlines:
            own_args, own_kwargs = tree_map_only(Tensor, _outline, (args, kwargs))
            result = func(*own_args, **own_kwargs)
            _make_room(self._outlines)
            self._outlines[key] = list(result) if isinstance(result, (tuple, list)) else [result]
        return self._outlines[key]

    @staticmethod
    def key(func: Any, args: Any, kwargs: Any) -> Key | None:
        """What decides the shape, stride, dtype and placement of a result; None if it is not done here."""
        if func in WRITES_IF_ASKED:
            if any(args[1:]) or any(kwargs.values()):
                return None
        elif func not in POINTWISE and (kwargs or (func not in RESHAPES and func not in REORDERS)):
            return None
        if any(isinstance(value, Tensor) for value in kwargs.values()):
            return None
        if func in RESHAPES and any(isinstance(arg, torch.dtype) for arg in args):  # a view of the bits
            return None
        return described(func, args, kwargs)


def _make_room(found: dict[Key, Any]) -> None:
    if len(found) >= MOST:
        found.clear()


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def described(func: Any, args: Any, kwargs: Any) -> Key | None:
    """A function and what decides the shape and stride of its results; None if that is not easily said."""
    parts: list[Any] = [func, torch.get_default_dtype(), len(args), *kwargs]
    if "out" in kwargs or not _describe((*args, *kwargs.values()), parts):
        return None
    return tuple(parts)


def _describe(values: Sequence[Any], parts: list[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is DTensor:
            parts.append(value._spec)
        elif isinstance(value, Tensor):
            parts.append((value.shape, value.stride(), value.dtype, value.device))
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


def _learnt(func: Any, args: Any, result: Any) -> Result | None:
    several = type(result) if type(result) in (tuple, list) else None
    results = result if several is not None else [result]
    if not results or not all(type(one) is DTensor and type(one.placements[0]) is Shard for one in results):
        return None
    specs = tuple(one._spec for one in results)
    if func in RESHAPES or func in REORDERS:
        if any(memory(one)._cdata != memory(args[0])._cdata for one in results):
            return None  # a copy, of which somebody has to be told
        return Result(specs, several, ())
    dim, length, *_ = _rows(specs[0])
    for arg in args:
        if isinstance(arg, DTensor) and not arg.placements[0].is_replicate():
            own = sharded_dim(arg)
            if own is None or own - arg.ndim != dim - results[0].ndim or arg.shape[own] != length:
                return None
    return Result(specs, several, tuple(_dim_to_divide(arg, dim - results[0].ndim, length) for arg in args))


def _rows(spec: DTensorSpec) -> tuple[int, int, int, int]:
    """The sharded dim, its length, how many ranks share it and which this one is."""
    placement = spec.placements[0]
    assert isinstance(placement, Shard)
    return placement.dim, spec.shape[placement.dim], spec.mesh.size(), spec.mesh.get_local_rank()


def _dim_to_divide(arg: Any, dim: int, length: int) -> int | None:
    """Of a whole operand, the dim of which a rank needs its rows; None if it needs all. `dim` counts from the end."""
    if not isinstance(arg, Tensor) or sharded_dim(arg) is not None or arg.ndim < -dim or arg.shape[dim] != length:
        return None
    return None if length == 1 else dim


@on_each_rank
def _on_shards(func: Any, kwargs: dict[str, Any], *own: Any) -> Any:
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
