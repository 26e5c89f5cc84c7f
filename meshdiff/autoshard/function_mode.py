"""Torch functions on shards: those that a placement alone would make gather are done by `ops`.

Everything else goes to DTensor if it is known to be right on shards (see
`dispatch_mode`), and else runs on whole tensors on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from meshdiff.autoshard.aliasing import AliasTracker, memory
from meshdiff.autoshard.dispatch_mode import SafetyMode, UnsafeMutation, UnsupportedOnShards
from meshdiff.autoshard.dtensor_utils import (
    all_replicated,
    as_replicated,
    dtensors,
    is_plainly_placed,
    is_sharded,
    map_dtensors,
    settled,
    to_plain,
)
from meshdiff.autoshard.lazy import LazyReshards
from meshdiff.autoshard.op_cache import CACHEABLE, WRITES_IF_ASKED, DispatchCache, cache_key, unseen
from meshdiff.autoshard.ops import nn as nn_ops
from meshdiff.autoshard.ops import slicing
from meshdiff.autoshard.ops.concat import BY_PARTS, by_parts
from meshdiff.autoshard.recorder import Recorder
from meshdiff.autoshard.registry import Handlers
from meshdiff.autoshard.reshard import SourceSlice, reshard

__all__ = ["ShardingMode"]

HANDLERS = Handlers({**slicing.HANDLERS, **nn_ops.HANDLERS})
LOOK_THEMSELVES = {*slicing.LATER, F.scaled_dot_product_attention}
"""These know what to do with rows that wait."""


class ShardingMode(TorchFunctionMode):
    """While it is on, torch functions take DTensors sharded over a 1-D mesh, mixed with plain tensors.

    Args:
        mesh: the 1-D mesh.
        aliases: where to note what shares memory on one device.
        strategy: of mesh attention.
        guard: is off while what is done here runs on parts of tensors.
        op_cache: what has been found out about operations.
        lazy: what waits for rows.
        recorder: is told of what runs, on shards and on whole tensors.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        aliases: AliasTracker,
        strategy: str,
        guard: SafetyMode,
        op_cache: DispatchCache,
        lazy: LazyReshards,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__()
        self.mesh, self.aliases, self.strategy, self.recorder = mesh, aliases, strategy, recorder
        self.unguarded, self.op_cache, self.lazy = guard.off, op_cache, lazy
        self.exchanging = 0  # how deep in a function that is done here, on parts of tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DESCRIPTIONS:
            return func(*args, **kwargs)
        key = None
        if func in CACHEABLE and self.does_again() and not self._waits(args):
            key = cache_key(func, args, kwargs)
            if key is not None and (known := self.op_cache.get(key)) is not None:
                return known.replay(func, args, kwargs, self.unguarded)
        if getattr(func, "__self__", None) is Tensor.data:
            if func.__name__ != "__get__":
                raise UnsafeMutation("data is given to a tensor, which no operation shows")
            func = Tensor.detach  # alike, but writes to it are counted: a call that starts again has to know of them
        if not _takes_shards(args, kwargs):
            if func is F.scaled_dot_product_attention:
                given = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))
                self.on_attention(given[0], given[1], False)
            if func in CACHEABLE and self.recorder is None and not kwargs and func not in WRITES_IF_ASKED:
                return unseen(func, *args)
            return func(*args, **kwargs)
        if func in UNKNOWABLE:
            raise UnsafeMutation(f"{func.__name__} looks at the memory of a tensor, of which a rank holds a part")
        if self.lazy and func in BY_PARTS:
            result = by_parts(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        handler = HANDLERS.find(func, args, kwargs)
        if handler is not None and _are_plainly_placed((args, kwargs)):
            if func not in LOOK_THEMSELVES:
                self.materialize(args, kwargs)
            self.exchanging += 1
            try:
                result = handler(self, *args, **kwargs)
            finally:
                self.exchanging -= 1
            if result is not NotImplemented:
                if key is not None and handler in nn_ops.DECIDED_BY_SHAPES:
                    self.op_cache.insert(key, func, args, kwargs, result)
                return result
        return self.run(func, args, kwargs)

    def _waits(self, args: Any) -> bool:
        return bool(self.lazy) and any(type(arg) is DTensor and arg in self.lazy for arg in args)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """By DTensor's rules if they are known to be right, else on whole tensors."""
        self.materialize(args, kwargs)
        writes = self.aliases.writes
        try:
            return self.natively(func, args, kwargs)
        except UnsupportedOnShards as reason:
            why = f"{reason} is not known to be right on shards"
        except (RuntimeError, NotImplementedError) as error:
            if not _is_of_propagation(error):
                raise
            why = "DTensor has no way to run it on these shards"
        if self.aliases.writes != writes:
            raise UnsafeMutation(f"{_name(func)} has written to shards before it came to what cannot run on them")
        return self.gathered(func, args, kwargs, why)

    def natively(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = cache_key(func, args, kwargs) if func in CACHEABLE and self.does_again() else None
        if key is not None and (result := self.op_cache.get(key)) is not None:
            return result.replay(func, args, kwargs, self.unguarded)
        whole = {name: all_replicated(kwargs[name], self.mesh) for name in kwargs}
        made = map_dtensors(settled, func(*all_replicated(args, self.mesh), **whole))
        if key is not None:
            self.op_cache.insert(key, func, args, kwargs, made)
        return made

    def does_again(self) -> bool:
        """Whether what is known decides all: gradients and autocast have a say, and a recorded call finds out."""
        autocast = torch.is_autocast_enabled(self.mesh.device_type)
        return self.recorder is None and not autocast and not torch.is_grad_enabled()

    def gathered(self, func: Any, args: Any, kwargs: Any, why: str) -> Any:
        """On whole tensors, on every rank alike; what is written to them is written to the shards as well."""
        name = _name(func)
        sharded = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, DTensor)}
        if any(is_sharded(tensor) and tensor.numel() for tensor in sharded.values()):
            self.on_gather(name, why)
        copies = {key: to_plain(tensor) for key, tensor in sharded.items()}
        versions = {key: copy._version for key, copy in copies.items()}
        args, kwargs = map_dtensors(lambda tensor: copies[id(tensor)], (args, kwargs))
        result = func(*args, **kwargs)
        for key, copy in copies.items():
            if copy._version != versions[key] and is_sharded(sharded[key]):
                own = memory(sharded[key])._cdata
                if any(key != other and memory(tensor)._cdata == own for other, tensor in sharded.items()):
                    raise UnsafeMutation(f"{name} writes to a tensor of which it is given a view as well")
                self._write_back(name, sharded[key], copy)
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor) and not isinstance(t, DTensor)):
            for key, copy in copies.items():
                if memory(tensor)._cdata == memory(copy)._cdata and is_sharded(sharded[key]):
                    self.aliases.link(sharded[key], tensor)
        return result

    def _write_back(self, name: str, tensor: DTensor, copy: Tensor) -> None:
        if torch.is_grad_enabled() and (tensor.requires_grad or copy.requires_grad):
            raise UnsafeMutation(f"{name} writes to shards, of which autograd would not know")
        tensor.copy_(as_replicated(copy, self.mesh).redistribute(placements=tensor.placements))

    def reshard(
        self, sources: Sequence[DTensor], outputs: Sequence[Sequence[SourceSlice]], dim: int, views: bool = False
    ) -> list[DTensor]:
        """New DTensors of rows of others, which move once somebody looks at them; see `reshard.reshard`."""
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            self.materialize(sources)
            with self.unguarded():
                return reshard(sources, outputs, dim, views)
        with self.unguarded():
            return self.lazy.reshard(sources, outputs, dim, sources[0].stride() if views else None)

    def materialize(self, *values: Any) -> None:
        """Have the rows there of what is going to be read."""
        if self.lazy and any(tensor in self.lazy for tensor in dtensors(values)):
            with self.unguarded():
                self.lazy.materialize(dtensors(values))

    def materialize_all(self) -> None:
        """Have all rows there."""
        with self.unguarded():
            self.lazy.materialize_all()

    def on_gather(self, function: str, why: str) -> None:
        if self.recorder is not None:
            self.recorder.on_gather(function, why)

    def on_attention(self, query: Tensor, key: Tensor, sharded: bool) -> None:
        if self.recorder is not None:
            self.recorder.on_attention(query, key, sharded)

    def viewed(self, source: Tensor, *results: DTensor) -> None:
        """Note that these are copies of what a view of `source` would be."""
        for result in results:
            self.aliases.link(source, result)


UNKNOWABLE = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.storage_offset, Tensor.set_,
              Tensor.__array__, Tensor.numpy}  # fmt: skip

DESCRIPTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex),
    *(torch.is_floating_point, torch.is_complex),
}
"""A DTensor says of itself what a tensor of one device does; nothing runs."""


def _takes_shards(args: Any, kwargs: Any) -> bool:
    for arg in args:  # most take them here, and a generator takes longer
        if type(arg) is DTensor:
            return True
    return next(dtensors((args, kwargs)), None) is not None


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _are_plainly_placed(values: Any) -> bool:
    return all(map(is_plainly_placed, dtensors(values)))


def _is_of_propagation(error: Exception) -> bool:
    """Whether DTensor refused, which it does before anything runs, and on all ranks alike."""
    text = str(error)
    return isinstance(error, NotImplementedError) or any(
        words in text
        for words in ("Sharding propagation failed", "sharding strategy", "placement changes", "got mixed torch.Tensor")
    )
