"""Torch functions on shards: those that a placement alone would make gather are done by `ops`.

Everything else goes to DTensor if it is known to be right on shards (see
`dispatch_mode`), and else runs on replicated tensors.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dispatch_mode import UnsafeMutation
from meshdiff.autoshard.dtensor_utils import (
    dtensors,
    is_plainly_placed,
)
from meshdiff.autoshard.op_cache import cache_key, unseen
from meshdiff.autoshard.op_traits import traits_of
from meshdiff.autoshard.ops import convolution, norms, reshape, slicing, spatial
from meshdiff.autoshard.ops import nn as nn_ops
from meshdiff.autoshard.ops.concat import by_parts
from meshdiff.autoshard.registry import Handlers

__all__ = ["ShardingMode"]

TABLES = (slicing.HANDLERS, nn_ops.HANDLERS, convolution.HANDLERS, norms.HANDLERS, spatial.HANDLERS, reshape.HANDLERS)

HANDLERS = Handlers({function: handler for table in TABLES for function, handler in table.items()})
"""The handlers of all files in `ops`; a test fails for a file whose table is not in it."""


class ShardingMode(TorchFunctionMode):
    """While it is on, torch functions take DTensors sharded over a 1-D mesh, mixed with plain tensors.

    Args:
        ctx: what handlers are given.
    """

    def __init__(self, ctx: ShardingContext) -> None:
        super().__init__()
        self.ctx = ctx

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traits = traits_of(func)
        if traits.metadata:
            return func(*args, **kwargs)
        key = None
        if traits.cacheable and self.ctx.does_again() and not self._waits(args):
            key = cache_key(func, args, kwargs)
            if key is not None and (known := self.ctx.op_cache.get(key)) is not None:
                return known.replay(func, args, kwargs, self.ctx.unguarded)
        if getattr(func, "__self__", None) is Tensor.data:
            if func.__name__ != "__get__":
                raise UnsafeMutation("data is given to a tensor, which no operation shows")
            func = Tensor.detach  # alike, but writes to it are counted: a call that starts again has to know of them
        if not _takes_shards(args, kwargs):
            if func is F.scaled_dot_product_attention:
                given = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))
                self.ctx.on_attention(given[0], given[1], False)
            if traits.cacheable and self.ctx.recorder is None and not kwargs and not traits.writes_if_asked:
                return unseen(func, *args)
            return func(*args, **kwargs)
        if traits.storage_access:
            raise UnsafeMutation(f"{func.__name__} looks at the memory of a tensor, of which a rank holds a part")
        if self.ctx.lazy and traits.by_parts:
            result = by_parts(self.ctx, func, args, kwargs)
            if result is not NotImplemented:
                return result
        handler = HANDLERS.find(func, args, kwargs)
        if handler is not None and _are_plainly_placed((args, kwargs)):
            if not traits.lazy_aware:
                self.ctx.materialize(args, kwargs)
            self.ctx.handler_depth += 1
            try:
                result = handler(self.ctx, *args, **kwargs)
            finally:
                self.ctx.handler_depth -= 1
            if result is not NotImplemented:
                if key is not None and traits.cached_handler:
                    self.ctx.op_cache.insert(key, func, args, kwargs, result)
                return result
        return self.ctx.run(func, args, kwargs)

    def _waits(self, args: Any) -> bool:
        return bool(self.ctx.lazy) and any(type(arg) is DTensor and arg in self.ctx.lazy for arg in args)


def _takes_shards(args: Any, kwargs: Any) -> bool:
    for arg in args:  # most take them here, and a generator takes longer
        if type(arg) is DTensor:
            return True
    return next(dtensors((args, kwargs)), None) is not None


def _are_plainly_placed(values: Any) -> bool:
    return all(map(is_plainly_placed, dtensors(values)))
