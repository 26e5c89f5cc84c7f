"""Which torch functions are done here on shards, and the way to do one that needs nothing of other ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from meshdiff.attention.local import from_shard, to_shard
from meshdiff.simulation import on_each_rank
from meshdiff.untouched.tensors import sharded_dim

if TYPE_CHECKING:
    from meshdiff.untouched.functions import OnShards

__all__ = ["Handlers", "by_shard"]

Handler = Callable[..., Any]
"""Takes the mode, then what the function takes; returns NotImplemented for arguments it has no way with."""


class Handlers(dict[Any, tuple[Handler, inspect.Signature]]):
    """Torch functions, and what does them on shards."""

    def of(self, *functions: Any) -> Callable[[Handler], Handler]:
        """Register what does these functions."""

        def register(handler: Handler) -> Handler:
            self.update(dict.fromkeys(functions, (handler, inspect.signature(handler))))
            return handler

        return register

    def find(self, func: Any, args: Any, kwargs: Any) -> Handler | None:
        """What does a function, if the call spells its arguments in a way that it reads."""
        handler, signature = self.get(func, (None, None))
        if signature is not None:
            try:
                signature.bind(None, *args, **kwargs)
            except TypeError:
                return None
        return handler


def by_shard(on: OnShards, tensor: Tensor, shape: torch.Size, func: Any, *args: Any) -> DTensor:
    """A function for which a rank needs nothing of others, and which keeps the sharded dim as it is."""
    dim = sharded_dim(tensor)
    assert dim is not None
    local = each(func, to_shard(tensor), *args)
    return from_shard(local, on.mesh, Shard(dim), like=torch.empty(shape, device="meta"))


@on_each_rank
def each(func: Callable[..., Tensor], tensor: Tensor, *args: Any) -> Tensor:
    return func(tensor, *args)
