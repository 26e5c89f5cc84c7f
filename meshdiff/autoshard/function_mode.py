"""Torch functions on shards: those that a placement alone would make gather are done by `ops`.

Everything else goes to DTensor if it is known to be right on shards (see
`dispatch_mode`), and else runs on whole tensors on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
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
from meshdiff.autoshard.op_cache import CACHEABLE, WRITES_IF_ASKED, cache_key, unseen
from meshdiff.autoshard.ops import nn as nn_ops
from meshdiff.autoshard.ops import slicing
from meshdiff.autoshard.ops.concat import BY_PARTS, by_parts
from meshdiff.autoshard.registry import Handlers

__all__ = ["ShardingMode"]

HANDLERS = Handlers({**slicing.HANDLERS, **nn_ops.HANDLERS})
LOOK_THEMSELVES = {*slicing.LATER, F.scaled_dot_product_attention}
"""These know what to do with rows that wait."""


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
        if func in DESCRIPTIONS:
            return func(*args, **kwargs)
        key = None
        if func in CACHEABLE and self.ctx.does_again() and not self._waits(args):
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
            if func in CACHEABLE and self.ctx.recorder is None and not kwargs and func not in WRITES_IF_ASKED:
                return unseen(func, *args)
            return func(*args, **kwargs)
        if func in UNKNOWABLE:
            raise UnsafeMutation(f"{func.__name__} looks at the memory of a tensor, of which a rank holds a part")
        if self.ctx.lazy and func in BY_PARTS:
            result = by_parts(self.ctx, func, args, kwargs)
            if result is not NotImplemented:
                return result
        handler = HANDLERS.find(func, args, kwargs)
        if handler is not None and _are_plainly_placed((args, kwargs)):
            if func not in LOOK_THEMSELVES:
                self.ctx.materialize(args, kwargs)
            self.ctx.exchanging += 1
            try:
                result = handler(self.ctx, *args, **kwargs)
            finally:
                self.ctx.exchanging -= 1
            if result is not NotImplemented:
                if key is not None and handler in nn_ops.DECIDED_BY_SHAPES:
                    self.ctx.op_cache.insert(key, func, args, kwargs, result)
                return result
        return self.ctx.run(func, args, kwargs)

    def _waits(self, args: Any) -> bool:
        return bool(self.ctx.lazy) and any(type(arg) is DTensor and arg in self.ctx.lazy for arg in args)


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


def _are_plainly_placed(values: Any) -> bool:
    return all(map(is_plainly_placed, dtensors(values)))
