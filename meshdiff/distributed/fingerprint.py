"""The contents of a tensor of any class, dtype and layout in a few small values, to compare tensors between ranks."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from meshdiff.distributed.simulation import is_simulated, outside, rank_values
from meshdiff.distributed.torch_compat import (
    AsyncCollectiveTensor,
    DisableTorchFunctionSubclass,
    has_torch_dispatch,
    is_traceable_wrapper_subclass,
)

__all__ = ["Entry", "bits", "fingerprint", "sha256", "sum_of_bits"]

PLAIN = (Tensor, nn.Parameter, nn.Buffer)
SMALL = (bool, int, str, type(None), torch.dtype, torch.layout, torch.Size)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COMPRESSED = {
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}
DEPTH = 4
"""Levels of attributes of a tensor in which other tensors are found."""

Path = tuple[str, ...]
Part = tuple[Any, ...]
Reduce = Callable[[Tensor], Any]


class Entry(NamedTuple):
    """One fact about a tensor.

    Attributes:
        path: its place among the facts about that tensor.
        part: the part of a DTensor that it describes, by its place on the mesh; () if it describes all of it. Ranks
            with the same path and part are to have the same value.
        value: can be compared and pickled.
    """

    path: Path
    part: Part
    value: Any


def fingerprint(tensor: Tensor, reduce: Reduce, rank: int | None = None) -> list[Entry]:
    """The facts that ranks which hold the same tensor agree on.

    - A plain tensor: shape, dtype and all bits, in any dtype; of a sparse, nested or quantized one the plain tensors
      that it consists of, its scales and zero points included. Strides do not count.
    - A class with `__tensor_flatten__` (torchao, quanto): its inner tensors, and the numbers, words and dtypes that
      it gives as its context.
    - Any other class: its own bits (GGUF, bitsandbytes), unless it defines `__torch_dispatch__`, which may leave it
      without memory of its own; and the tensors, numbers and words among its attributes.
    - A DTensor (FSDP2): placements, shape, dtype and shape of its mesh; of its local tensor the same facts as here,
      which only ranks that hold the same part have to share.
    - Of meta, fake and lazy tensors, and of those that torch cannot read, only class, shape and dtype.

    Args:
        tensor: on any device.
        reduce: makes a small value of a plain tensor of integers, which are the bits of a part of `tensor`.
        rank: the rank whose value is meant, by its number in the world, in a simulation.
    """
    with outside(), torch.no_grad():
        if _is_read_directly(tensor):  # most are, and there are thousands of weights
            return [Entry((), (), (tuple(tensor.shape), tensor.dtype, *_read(lambda: _bits(tensor), reduce)))]
        return list(_entries(tensor, reduce, rank, (), (), DEPTH))


def bits(tensor: Tensor) -> list[Tensor]:
    """The memory of a tensor as plain tensors of integers, of all that `fingerprint` reads of it; views, if strided."""
    if _is_read_directly(tensor):
        return [_bits(tensor)]
    found: list[Tensor] = []
    fingerprint(tensor, found.append)
    return found


def sum_of_bits(integers: Tensor) -> int:
    """The sum of the integers, computed on the tensor's own device in one pass, as weights are large."""
    return int(integers.sum(dtype=torch.int64))


def sha256(integers: Tensor) -> str:
    """A short name for the values, to the bit, in their order."""
    values = integers.cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(values.data_ptr(), values.nbytes)).hexdigest()[:12]


def _detached(tensor: Tensor) -> list[Tensor]:
    """The plain tensor behind one of a class with `__torch_dispatch__`, such as an output not computed yet, if any."""
    try:
        detached = tensor.detach()
    except (RuntimeError, NotImplementedError, TypeError):
        return []
    return [detached] if type(detached) in PLAIN else []


def _is_read_directly(tensor: Tensor) -> bool:
    strided = type(tensor) in PLAIN and tensor.layout == torch.strided
    return strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def _entries(tensor: Tensor, reduce: Reduce, rank: int | None, path: Path, part: Part, depth: int) -> Iterator[Entry]:
    values = rank_values(tensor)
    if rank is not None and len(values) > 1:
        tensor = values[rank]
    elif values[0] is not tensor:
        tensor = values[0]
    kind = type(tensor)
    if kind in PLAIN:
        yield from _of_plain(tensor, reduce, path, part)
    elif isinstance(tensor, AsyncCollectiveTensor):  # whose inner tensor may not be there yet
        yield from _entries(tensor.wait(), reduce, rank, path, part, depth)
    elif isinstance(tensor, DTensor):
        sizes, placements = tuple(tensor.device_mesh.shape), tuple(map(str, tensor.placements))
        outline = tuple(tensor.shape), tensor.dtype, sizes, tensor.device_mesh.mesh_dim_names, placements
        yield Entry(path, part, ("DTensor", *outline))
        part = (*part, _place(tensor, rank))
        yield from _entries(tensor.to_local(), reduce, rank, (*path, "local"), part, depth)
    elif is_lazy(tensor):
        yield Entry(path, part, kind.__name__)
    elif tensor.is_nested:
        yield from _of_nested(tensor, reduce, path, part)
    elif is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        yield Entry(path, part, (kind.__name__, *_outline(tensor)))
        inner = {name: getattr(tensor, name) for name in names}
        yield from _of_attributes({**inner, "": context}, reduce, rank, path, part, depth)
    elif has_torch_dispatch(kind) and (plain := _detached(tensor)):
        yield from _of_plain(plain[0], reduce, path, part)
    elif has_torch_dispatch(kind):
        yield Entry(path, part, (kind.__name__, *_outline(tensor)))
        yield from _of_attributes(vars(tensor), reduce, rank, path, part, depth)
    else:
        detached = tensor.detach()
        with DisableTorchFunctionSubclass():
            own = tensor.as_subclass(Tensor)
        if type(detached) not in (kind, Tensor) or detached.untyped_storage()._cdata != own.untyped_storage()._cdata:
            yield from _entries(detached, reduce, rank, path, part, depth)  # of what it stands for
            return
        yield Entry(path, part, kind.__name__)
        yield from _of_plain(own, reduce, (*path, "itself"), part)
        yield from _of_attributes(vars(tensor), reduce, rank, path, part, depth)


def _outline(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype


def _place(tensor: DTensor, rank: int | None) -> Part:
    """The place on the mesh of this rank's part: its coordinate, with -1 for the dims along which it is replicated."""
    mesh = tensor.device_mesh
    coordinate: Sequence[int] | None = None
    if rank is None or not is_simulated():
        coordinate = mesh.get_coordinate()
    else:
        coordinate = next(iter((mesh.mesh == rank).nonzero().tolist()), [rank] * mesh.ndim)
    if coordinate is None:  # not on that mesh
        return ("none",)
    return tuple(
        -1 if placement.is_replicate() else int(own)
        for placement, own in zip(tensor.placements, coordinate, strict=True)
    )


def _of_plain(tensor: Tensor, reduce: Reduce, path: Path, part: Part) -> Iterator[Entry]:
    """The facts about a tensor whose behaviour no Python class changes."""
    if tensor.is_nested:
        yield from _of_nested(tensor, reduce, path, part)
    elif tensor.is_meta:
        yield Entry(path, part, (*_outline(tensor), "meta"))
    elif _is_read_directly(tensor):
        yield Entry(path, part, (*_outline(tensor), *_read(lambda: _bits(tensor), reduce)))
    else:
        yield Entry(path, part, (*_outline(tensor), str(tensor.layout)))
        parts = _of_quantized if tensor.is_quantized else _of_layout
        try:
            inner = parts(tensor.detach())
        except (RuntimeError, NotImplementedError):
            return
        yield from _of_attributes(inner, reduce, None, path, part, 1)


def _of_nested(tensor: Tensor, reduce: Reduce, path: Path, part: Part) -> Iterator[Entry]:
    rows = tensor.detach().unbind()
    yield Entry(path, part, ("nested", str(tensor.layout), tensor.dtype, len(rows)))
    for i, row in enumerate(rows):
        yield from _of_plain(row, reduce, (*path, str(i)), part)


def _of_layout(tensor: Tensor) -> dict[str, Any]:
    if tensor.layout == torch.sparse_coo:
        return {"indices": tensor._indices(), "values": tensor._values()}
    if tensor.layout in COMPRESSED:
        return {name: getattr(tensor, name)() for name in COMPRESSED[tensor.layout]}
    return {"dense": tensor.to_dense()}


def _of_quantized(tensor: Tensor) -> dict[str, Any]:
    scheme = str(tensor.qscheme())
    inner = {"integers": tensor.int_repr(), "scheme": scheme}
    if "channel" in scheme:
        scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return inner | {"scales": scales, "zeros": zeros, "axis": tensor.q_per_channel_axis()}
    return inner | {"scale": tensor.q_scale(), "zero": tensor.q_zero_point()}


def _of_attributes(
    items: Mapping[Any, Any], reduce: Reduce, rank: int | None, path: Path, part: Part, depth: int
) -> Iterator[Entry]:
    for name, value in items.items():
        yield from _of_value(value, reduce, rank, (*path, str(name)), part, depth)


def _of_value(value: Any, reduce: Reduce, rank: int | None, path: Path, part: Part, depth: int) -> Iterator[Entry]:
    """The facts about an attribute of a tensor, leaving out its device and its identity."""
    if isinstance(value, Tensor):
        if depth:
            yield from _entries(value, reduce, rank, path, part, depth - 1)
    elif isinstance(value, enum.Enum):
        yield Entry(path, part, value.name)
    elif isinstance(value, float):
        yield Entry(path, part, "nan" if math.isnan(value) else value)  # which is not equal to itself
    elif type(value) in SMALL:
        yield Entry(path, part, tuple(value) if isinstance(value, torch.Size) else value)
    else:
        yield Entry(path, part, type(value).__name__)
        if not depth:
            return
        if isinstance(value, Mapping):
            inner = value
        elif isinstance(value, (list, tuple)):
            inner = dict(enumerate(value))
        elif type(value).__module__.startswith("torch.") or isinstance(value, type) or callable(value):
            return
        elif dataclasses.is_dataclass(value):
            inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        else:
            inner = getattr(value, "__dict__", {})
        yield from _of_attributes(inner, reduce, rank, path, part, depth - 1)


def _read(values: Callable[[], Tensor], reduce: Reduce) -> tuple[Any, ...]:
    """The values after `reduce`; an empty tuple if torch cannot read them, which is then so on every rank."""
    try:
        return (reduce(values()),)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:
        return ()


def _bits(tensor: Tensor) -> Tensor:
    """The memory of a strided tensor, as integers, for any dtype."""
    values = tensor.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    return values.resolve_neg().view(INTEGERS[values.element_size()])
