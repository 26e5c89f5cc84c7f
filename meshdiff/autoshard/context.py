"""The argument of each handler: the mesh, what is known of tensors on it, and ways to run functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.autoshard.aliasing import AliasTracker, memory
from meshdiff.autoshard.dispatch_mode import UnsafeMutation, UnsupportedOnShards
from meshdiff.autoshard.dtensor_utils import (
    all_replicated,
    as_replicated,
    dtensors,
    is_sharded,
    map_dtensors,
    summed,
    to_plain,
)
from meshdiff.autoshard.lazy import LazyReshards
from meshdiff.autoshard.op_cache import DispatchCache, cache_key
from meshdiff.autoshard.op_traits import traits_of
from meshdiff.autoshard.recorder import Recorder
from meshdiff.autoshard.reshard import SourceSlice, reshard
from meshdiff.distributed.torch_compat import tree_leaves

__all__ = ["ShardingContext"]


@dataclass
class ShardingContext:
    """One call of a model on one mesh.

    Attributes:
        mesh: the 1-D mesh.
        aliases: where to note what shares memory on one device.
        strategy: of mesh attention, a name in `STRATEGIES` or `auto`.
        of_images: True if rows of images are sharded, not tokens: then views move entries to keep them sharded.
        unguarded: turns the safety mode off while what is done here runs on parts of tensors.
        op_cache: what DTensor has made of operations.
        lazy: what waits for rows.
        recorder: records what runs, on shards and on replicated tensors.
        merged: sizes of dims that were merged in this call, and which of them was sharded, see `ops.reshape`.
        handler_depth: number of handlers that are running; their operations are not recorded.
    """

    mesh: DeviceMesh
    aliases: AliasTracker
    strategy: str
    of_images: bool
    unguarded: Callable[[], AbstractContextManager[None]]
    op_cache: DispatchCache
    lazy: LazyReshards
    recorder: Recorder | None = None
    merged: dict[tuple[int, ...], int] = field(default_factory=dict)
    handler_depth: int = 0

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function by DTensor's rules if they are known to be right, else on replicated tensors."""
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
        """Run a function by DTensor, or by the cache of what DTensor made of it.

        Raises:
            UnsupportedOnShards: for an operation that is not known to be right on shards.
        """
        key = cache_key(func, args, kwargs) if traits_of(func).cacheable and self.does_again() else None
        if key is not None and (result := self.op_cache.get(key)) is not None:
            return result.replay(func, args, kwargs, self.unguarded)
        replicated = {name: all_replicated(kwargs[name], self.mesh) for name in kwargs}
        made = map_dtensors(summed, func(*all_replicated(args, self.mesh), **replicated))
        if key is not None:
            self.op_cache.insert(key, func, args, kwargs, made)
        return made

    def does_again(self) -> bool:
        """True if cached results may be used: not with gradients or autocast, and not while a call is recorded."""
        autocast = torch.is_autocast_enabled(self.mesh.device_type)
        return self.recorder is None and not autocast and not torch.is_grad_enabled()

    def gathered(self, func: Any, args: Any, kwargs: Any, why: str) -> Any:
        """Run a function on replicated tensors, on every rank alike; writes to them go to the shards as well."""
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
        """New DTensors of rows of others, which move once an operation reads them; see `reshard.reshard`."""
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            self.materialize(sources)
            with self.unguarded():
                return reshard(sources, outputs, dim, views)
        with self.unguarded():
            return self.lazy.reshard(sources, outputs, dim, sources[0].stride() if views else None)

    def padded(self, tensor: DTensor) -> tuple[DTensor, int]:
        """The rows of a DTensor that waits for no more than zeros around them, and the number of zeros before them.

        Of every other DTensor itself, and no zeros.
        """
        found = self.lazy.padded(tensor) if self.lazy else None
        return found or (tensor, 0)

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


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _is_of_propagation(error: Exception) -> bool:
    """True if DTensor refused, which it does before anything runs, and on all ranks alike."""
    text = str(error)
    return isinstance(error, NotImplementedError) or any(
        words in text
        for words in ("Sharding propagation failed", "sharding strategy", "placement changes", "got mixed torch.Tensor")
    )
