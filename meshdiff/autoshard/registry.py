"""A table of the torch functions that are done here on shards, and a way to do one that needs no other rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import sharded_dim
from meshdiff.distributed.local_shards import contiguous_stride, to_shard, wrap
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["Handlers", "by_shard"]

Handler = Callable[..., Any]
"""Does a torch function on shards.

It takes a `ShardingContext` and then what the function takes, with at least one DTensor, each of them replicated or
sharded along one dim. It returns what the function returns, in DTensors, or NotImplemented for arguments that it has
no way with; then DTensor runs the function, or it runs on replicated tensors.
"""


class Handlers(dict[Any, Handler]):
    """Torch functions, and the handler of each on shards."""

    def of(self, *functions: Any) -> Callable[[Handler], Handler]:
        """A decorator that registers a `Handler` of these torch functions."""

        def register(handler: Handler) -> Handler:
            self.update(dict.fromkeys(functions, handler))
            return handler

        return register

    def find(self, func: Any, args: Any, kwargs: Any) -> Handler | None:
        """The handler of a function; None if there is none that takes the arguments in the form of this call."""
        handler = self.get(func)
        return handler if handler is not None and _reads(handler, len(args), tuple(kwargs)) else None


@lru_cache(maxsize=4096)
def _reads(handler: Handler, places: int, names: tuple[str, ...]) -> bool:
    try:
        inspect.signature(handler).bind(None, *range(places), **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def by_shard(
    ctx: ShardingContext,
    tensor: Tensor,
    shape: torch.Size,
    func: Any,
    *args: Any,
    stride: tuple[int, ...] | None = None,
) -> DTensor:
    """Run a function for which a rank needs nothing of others, and which keeps the sharded dim as it is.

    Args:
        ctx: that of the handler that calls this.
        tensor: the operand that is sharded. Its rows that wait are materialized; those of other operands are not.
        shape: of the full result.
        func: takes this rank's shard and `args`, and returns its shard of the result, contiguous unless `stride` is
            given.
        args: the other arguments: plain tensors that are the same on every rank, see `own_copy`, and other values.
            There are no keyword arguments.
        stride: of the full result as on one device; by default that of a contiguous tensor.

    Returns:
        A DTensor that is sharded along the same dim as `tensor`, with the dtype that `func` gives it.
    """
    dim = sharded_dim(tensor)
    assert dim is not None
    ctx.materialize(tensor)
    with ctx.unguarded():
        local = each(func, to_shard(tensor), *args)
    return wrap(local, ctx.mesh, Shard(dim), shape, stride or contiguous_stride(shape))


@on_each_rank
def each(func: Callable[..., Tensor], tensor: Tensor, *args: Any) -> Tensor:
    return func(tensor, *args)
