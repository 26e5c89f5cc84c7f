"""Torch functions on shards: those that a placement alone would make gather, done here by exchanges.

Everything else goes to DTensor if it is known to be right on shards (see
`guard.py`), and else runs on whole tensors on every rank.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from meshdiff.attention import mesh_attention
from meshdiff.attention.local import from_shard, to_shard
from meshdiff.attention.problem import chunk_sizes
from meshdiff.placements import WHOLE
from meshdiff.simulation import on_each_rank
from meshdiff.untouched.aliases import Aliases, memory
from meshdiff.untouched.guard import NotOnShards, Unsafe
from meshdiff.untouched.recorder import Recorder
from meshdiff.untouched.rows import Piece, rearrange
from meshdiff.untouched.tensors import (
    as_whole,
    is_plainly_placed,
    is_sharded,
    map_dtensors,
    settled,
    sharded_dim,
    to_plain,
)

__all__ = ["OnShards"]

Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}


def fits(handler: Handler, args: Any, kwargs: Any) -> bool:
    """Whether a call spells its arguments in a way that the handler reads."""
    try:
        inspect.signature(handler).bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register what does these functions on shards; it returns NotImplemented for arguments it has no way with."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


class OnShards(TorchFunctionMode):
    """While it is on, torch functions take DTensors sharded over a 1-D mesh, mixed with plain tensors.

    Args:
        mesh: the 1-D mesh.
        aliases: where to note what shares memory on one device.
        strategy: of mesh attention.
        recorder: is told of what runs, on shards and on whole tensors.
    """

    def __init__(self, mesh: DeviceMesh, aliases: Aliases, strategy: str, recorder: Recorder | None = None) -> None:
        super().__init__()
        self.mesh, self.aliases, self.strategy, self.recorder = mesh, aliases, strategy, recorder
        self.exchanging = 0  # how deep in a function that is done here, on parts of tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is Tensor.data:
            if func.__name__ != "__get__":
                raise Unsafe("data is given to a tensor, which no operation shows")
            func = Tensor.detach  # alike, but writes to it are counted: a call that starts again has to know of them
        if not _has_dtensor(args) and not (kwargs and _has_dtensor(kwargs.values())):
            if func is F.scaled_dot_product_attention:
                query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
                self.on_attention(query, key, False)
            return func(*args, **kwargs)
        if func in UNKNOWABLE:
            raise Unsafe(f"{func.__name__} looks at the memory of a tensor, of which a rank holds a part")
        handler = HANDLERS.get(func)
        if handler is not None and fits(handler, args, kwargs) and _are_plainly_placed((args, kwargs)):
            self.exchanging += 1
            try:
                result = handler(self, *args, **kwargs)
            finally:
                self.exchanging -= 1
            if result is not NotImplemented:
                return result
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """By DTensor's rules if they are known to be right, else on whole tensors."""
        writes = self.aliases.writes
        try:
            return self.natively(func, args, kwargs)
        except NotOnShards as reason:
            why = f"{reason} is not known to be right on shards"
        except (RuntimeError, NotImplementedError) as error:
            if not _is_of_propagation(error):
                raise
            why = "DTensor has no way to run it on these shards"
        if self.aliases.writes != writes:
            raise Unsafe(f"{_name(func)} has written to shards before it came to what cannot run on them")
        return self.gathered(func, args, kwargs, why)

    def natively(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda tensor: as_whole(tensor, self.mesh), (args, kwargs))
        return map_dtensors(settled, func(*args, **kwargs))

    def gathered(self, func: Any, args: Any, kwargs: Any, why: str) -> Any:
        """On whole tensors, on every rank alike; what is written to them is written to the shards as well."""
        name = _name(func)
        sharded = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, DTensor)}
        if any(map(is_sharded, sharded.values())):
            self.on_gather(name, why)
        copies = {key: to_plain(tensor) for key, tensor in sharded.items()}
        versions = {key: copy._version for key, copy in copies.items()}
        args, kwargs = map_dtensors(lambda tensor: copies[id(tensor)], (args, kwargs))
        result = func(*args, **kwargs)
        for key, copy in copies.items():
            if copy._version != versions[key] and is_sharded(sharded[key]):
                own = memory(sharded[key])._cdata
                if any(key != other and memory(tensor)._cdata == own for other, tensor in sharded.items()):
                    raise Unsafe(f"{name} writes to a tensor of which it is given a view as well")
                self._write_back(name, sharded[key], copy)
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor) and not isinstance(t, DTensor)):
            for key, copy in copies.items():
                if memory(tensor)._cdata == memory(copy)._cdata and is_sharded(sharded[key]):
                    self.aliases.join(sharded[key], tensor)
        return result

    def _write_back(self, name: str, tensor: DTensor, copy: Tensor) -> None:
        if torch.is_grad_enabled() and (tensor.requires_grad or copy.requires_grad):
            raise Unsafe(f"{name} writes to shards, of which autograd would not know")
        tensor.copy_(as_whole(copy, self.mesh).redistribute(placements=tensor.placements))

    def on_gather(self, function: str, why: str) -> None:
        if self.recorder is not None:
            self.recorder.on_gather(function, why)

    def on_attention(self, query: Tensor, key: Tensor, sharded: bool) -> None:
        if self.recorder is not None:
            self.recorder.on_attention(query, key, sharded)

    def viewed(self, source: Tensor, *results: DTensor) -> None:
        """Note that these are copies of what a view of `source` would be."""
        for result in results:
            self.aliases.join(source, result)


UNKNOWABLE = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.set_, Tensor.__array__, Tensor.numpy}


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _has_dtensor(values: Any) -> bool:
    for value in values:
        if isinstance(value, DTensor):
            return True
        if isinstance(value, (list, tuple)) and _has_dtensor(value):
            return True
    return False


def _are_plainly_placed(values: Any) -> bool:
    return all(is_plainly_placed(leaf) for leaf in tree_leaves(values) if isinstance(leaf, DTensor))


def _is_of_propagation(error: Exception) -> bool:
    """Whether DTensor refused, which it does before anything runs, and on all ranks alike."""
    text = str(error)
    return isinstance(error, NotImplementedError) or any(
        words in text
        for words in ("Sharding propagation failed", "sharding strategy", "placement changes", "got mixed torch.Tensor")
    )


@handles(torch.cat, torch.concat, torch.concatenate)
def _cat(on: OnShards, tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Any:
    dim %= tensors[0].ndim
    dims = {sharded_dim(tensor) for tensor in tensors} - {None}
    if dims != {dim} or kwargs or len({tensor.ndim for tensor in tensors}) > 1:
        return NotImplemented
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    tensors = [tensor.to(dtype) for tensor in tensors]
    pieces = [Piece(i, 0, tensor.shape[dim]) for i, tensor in enumerate(tensors)]
    return rearrange([as_whole(tensor, on.mesh) for tensor in tensors], [pieces], dim)[0]


def _cut(on: OnShards, tensor: DTensor, sizes: Sequence[int], dim: int) -> tuple[DTensor, ...]:
    """Consecutive parts of the sharded dim."""
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    parts = rearrange([tensor], [[Piece(0, a, b)] for a, b in itertools.pairwise(bounds)], dim, True)
    on.viewed(tensor, *parts)
    return tuple(parts)


@handles(torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes)
def _split(on: OnShards, tensor: DTensor, split_size_or_sections: Any, dim: int = 0) -> Any:
    dim %= tensor.ndim
    length, sizes = tensor.shape[dim], split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)] if sizes > 0 else []
    if sum(sizes) != length or not length:
        return NotImplemented
    if sharded_dim(tensor) != dim:
        return _slices(on, tensor, sizes, dim)
    return _cut(on, tensor, sizes, dim)


def _slices(on: OnShards, tensor: DTensor, sizes: Sequence[int], dim: int) -> Any:
    """Consecutive parts of another dim; torch gives plain zeros as the gradient of those of a split that have none."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return NotImplemented
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        on.run(torch.narrow, (tensor, dim, start, size), {}) for start, size in zip(starts, sizes, strict=True)
    )


@handles(torch.chunk, Tensor.chunk)
def _chunk(on: OnShards, tensor: DTensor, chunks: int, dim: int = 0) -> Any:
    return _split(on, tensor, [size for size in chunk_sizes(tensor.shape[dim], chunks) if size], dim)


@handles(torch.narrow, Tensor.narrow)
def _narrow(on: OnShards, tensor: DTensor, dim: int, start: Any, length: int) -> Any:
    dim %= tensor.ndim
    if sharded_dim(tensor) != dim or not isinstance(start, int):
        return NotImplemented
    return _rows(on, tensor, start % max(1, tensor.shape[dim]), length, dim)


def _rows(on: OnShards, tensor: DTensor, start: int, length: int, dim: int) -> DTensor:
    (part,) = rearrange([tensor], [[Piece(0, start, start + length)]], dim, True)
    on.viewed(tensor, part)
    return part


@handles(F.pad)
def _pad(on: OnShards, input: DTensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    dim = sharded_dim(input)
    if dim is None or mode != "constant":
        return NotImplemented
    place = 2 * (input.ndim - 1 - dim)
    before, after = pad[place : place + 2] if place < len(pad) else (0, 0)
    if before < 0 or after < 0 or ((before or after) and value):
        return NotImplemented
    if before or after:
        pieces = [Piece(None, 0, before), Piece(0, 0, input.shape[dim]), Piece(None, 0, after)]
        (input,) = rearrange([input], [[piece for piece in pieces if len(piece)]], dim)
    others = [*pad[:place], *(0,) * len(pad[place : place + 2]), *pad[place + 2 :]]
    shape = F.pad(torch.empty(input.shape, device="meta"), others).shape
    return _by_shard(on, input, shape, F.pad, others, "constant", value)


def _by_shard(on: OnShards, tensor: Tensor, shape: torch.Size, func: Any, *args: Any) -> DTensor:
    """A function for which a rank needs nothing of others, and which keeps the sharded dim as it is."""
    dim = sharded_dim(tensor)
    assert dim is not None
    local = _each(func, to_shard(tensor), *args)
    return from_shard(local, on.mesh, Shard(dim), like=torch.empty(shape, device="meta"))


@handles(Tensor.__getitem__)
def _getitem(on: OnShards, tensor: Tensor, index: Any) -> Any:
    plain = _plain_index(tensor, index)
    if plain is None:
        return NotImplemented
    place, entry, dim = plain.place, plain.entry, plain.dim
    start, stop = entry
    if (start, stop) == (0, tensor.shape[dim]):
        return NotImplemented
    assert isinstance(tensor, DTensor)
    if plain.is_number:  # a row that a rank has, for everyone
        row = _rows(on, tensor, start, 1, dim)
        part = DTensor.from_local(
            to_plain(row), on.mesh, [WHOLE], run_check=False, shape=row.shape, stride=row.stride()
        )
        on.viewed(tensor, part)
        rest: int | slice = 0
    else:
        part, rest = _rows(on, tensor, start, max(0, stop - start), dim), slice(None)
    return on.run(Tensor.__getitem__, (part, (*plain.index[:place], rest, *plain.index[place + 1 :])), {})


@handles(Tensor.__setitem__)
def _setitem(on: OnShards, tensor: Tensor, index: Any, value: Any) -> Any:
    plain = _plain_index(tensor, index)
    if plain is None or plain.is_number or not isinstance(value, Tensor):
        return NotImplemented
    (start, stop), dim = plain.entry, plain.dim
    length = tensor.shape[dim]
    if (start, stop) == (0, length):
        return NotImplemented
    fits = (*tensor.shape[:dim], stop - start, *tensor.shape[dim + 1 :])
    if tuple(value.shape) != fits or any(entry != slice(None) for entry in plain.others) or value.dtype != tensor.dtype:
        return NotImplemented
    assert isinstance(tensor, DTensor)
    rows = as_whole(value, on.mesh)
    if sharded_dim(rows) not in (None, dim):
        return NotImplemented
    pieces = [Piece(0, 0, start), Piece(1, 0, stop - start), Piece(0, stop, length)]
    (written,) = rearrange([tensor, rows], [[piece for piece in pieces if len(piece)]], dim)
    tensor.copy_(written)
    return None


class _PlainIndex:
    """An index of slices and numbers, and what it does to the sharded dim."""

    def __init__(self, index: tuple[Any, ...], place: int, dim: int, length: int) -> None:
        self.index, self.place, self.dim = index, place, dim
        self.others = [entry for i, entry in enumerate(index) if i != place]
        given = index[place]
        self.is_number = not isinstance(given, slice)
        self.entry = (given % length, given % length + 1) if self.is_number else given.indices(length)[:2]


def _plain_index(tensor: Tensor, index: Any) -> _PlainIndex | None:
    """How an index goes along the sharded dim; None if it does not, or is no simple one."""
    dim = sharded_dim(tensor)
    entries = index if isinstance(index, tuple) else (index,)
    if dim is None or not all(
        entry is None or isinstance(entry, (slice, EllipsisType)) or type(entry) is int for entry in entries
    ):
        return None
    taken = sum(entry is not None and not isinstance(entry, EllipsisType) for entry in entries)
    missing = (slice(None),) * (tensor.ndim - taken)
    if any(isinstance(entry, EllipsisType) for entry in entries):
        place = next(i for i, entry in enumerate(entries) if isinstance(entry, EllipsisType))
        entries = (*entries[:place], *missing, *entries[place + 1 :])
    else:
        entries = (*entries, *missing)
    places = [i for i, entry in enumerate(entries) if entry is not None]
    if len(places) <= dim:
        return None
    given = entries[places[dim]]
    simple = not isinstance(given, slice) or (
        given.step in (None, 1) and all(bound is None or type(bound) is int for bound in (given.start, given.stop))
    )
    return _PlainIndex(entries, places[dim], dim, tensor.shape[dim]) if simple and tensor.shape[dim] else None


@handles(F.linear)
def _linear(on: OnShards, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """DTensor flattens the dims before the last, which it cannot do with a shard of one of them unless it is even."""
    dim = sharded_dim(input)
    weights = [as_whole(tensor, on.mesh) for tensor in (weight, bias) if tensor is not None]
    if dim is None or dim == input.ndim - 1 or any(map(is_sharded, weights)):
        return NotImplemented
    shape = torch.Size((*input.shape[:-1], weight.shape[0]))
    if on.recorder is not None:
        on.recorder.on_linear(shape, weight)
    return _by_shard(on, input, shape, F.linear, *map(to_shard, weights))


@handles(torch.unbind, Tensor.unbind)
def _unbind(on: OnShards, tensor: DTensor, dim: int = 0) -> Any:
    dim %= tensor.ndim
    if sharded_dim(tensor) != dim:
        if torch.is_grad_enabled() and tensor.requires_grad:  # see `_slices`
            return tuple(on.run(torch.select, (tensor, dim, i), {}) for i in range(tensor.shape[dim]))
        return NotImplemented
    whole = as_whole(to_plain(tensor), on.mesh)
    on.on_gather("unbind", "each row of a sharded dim is to be a tensor")
    on.viewed(tensor, whole)
    return tuple(whole.select(dim, i) for i in range(tensor.shape[dim]))  # see `_slices`


@handles(torch.view_as_complex, torch.view_as_real)
def _between_real_and_complex(on: OnShards, tensor: DTensor) -> Any:
    """DTensor has no rule for these; along the last dim a rank needs nothing of others."""
    dim = sharded_dim(tensor)
    func = torch.view_as_real if tensor.is_complex() else torch.view_as_complex
    if dim is None or (func is torch.view_as_complex and dim == tensor.ndim - 1):
        return NotImplemented
    shape = torch.Size([*tensor.shape, 2] if tensor.is_complex() else tensor.shape[:-1])
    result = _by_shard(on, tensor, shape, func)
    on.viewed(tensor, result)
    return result


@on_each_rank
def _each(func: Callable[..., Tensor], tensor: Tensor, *args: Any) -> Tensor:
    return func(tensor, *args)


def _by_batch(on: OnShards, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Attention within each entry of a sharded batch, or of sharded heads: nothing is sent."""
    dim = sharded_dim(query)
    assert dim is not None
    if not query.shape[dim] == key.shape[dim] == value.shape[dim]:
        return NotImplemented
    on.on_attention(query, key, True)
    local = _attend_each(*map(to_shard, (query, key, value)), **options)
    shape = (*query.shape[:-1], value.shape[-1])
    return from_shard(local, on.mesh, Shard(dim), like=torch.empty(shape, device="meta"))


@on_each_rank
def _attend_each(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return (
        F.scaled_dot_product_attention(query, key, value, **options) if query.numel() else query.new_empty(query.shape)
    )


@handles(F.scaled_dot_product_attention)
def _attention(
    on: OnShards,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    dims = [sharded_dim(tensor) for tensor in (query, key, value)]
    seq = query.ndim - 2
    alike = query.ndim == key.ndim == value.ndim == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
    # Without enable_gqa a single head of key and value is for all heads, as ever in broadcasting.
    grouped = alike and (query.shape[1] == key.shape[1] or key.shape[1] == 1 or enable_gqa)
    mask_gradient = attn_mask is not None and attn_mask.requires_grad
    if not dropout_p and attn_mask is None and len(set(dims)) == 1 and dims[0] is not None and dims[0] < seq:
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _by_batch(on, query, key, value, **options)
    if dropout_p or not alike or not grouped or mask_gradient or set(dims) - {seq, None} or not set(dims) - {None}:
        on.on_attention(query, key, False)
        return NotImplemented
    query, key, value = (as_whole(tensor, on.mesh) for tensor in (query, key, value))
    cross = dims[1] is None and dims[2] is None
    placed = [Shard(seq)] * 3 if not cross else [Shard(seq), key.placements[0], key.placements[0]]
    rows = [
        tensor.redistribute(placements=[placement]).transpose(1, 2)
        for tensor, placement in zip((query, key, value), placed, strict=True)
    ]
    if isinstance(attn_mask, DTensor):
        attn_mask = to_plain(attn_mask)
    on.on_attention(query, key, True)
    attended = mesh_attention(*rows, attn_mask=attn_mask, is_causal=is_causal, scale=scale, strategy=on.strategy)
    return attended.transpose(1, 2)
