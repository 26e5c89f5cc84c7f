"""Linear layers of DTensors for torch 2.11, which cannot take shards of a batch above 1; on 2.13 nothing changes."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshdiff.distributed.local_shards import contiguous_stride, to_shard, wrap
from meshdiff.distributed.placements import REPLICATED
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["on_shards"]

LINEAR_TAKES_SHARDS = torch.__version__ >= "2.13"  # which compares numbers


def on_shards(module: nn.Module) -> nn.Module:
    """Let every `nn.Linear` inside `module` take DTensors of any batch, in place; its weights are to be DTensors.

    Subclasses of `nn.Linear` are left as they are, as they may compute something else.
    """
    if not LINEAR_TAKES_SHARDS:
        for child in module.modules():
            if type(child) is nn.Linear:
                child.__class__ = _LinearOnShards
    return module


class _LinearOnShards(nn.Linear):
    """A linear layer that each rank computes on its shard alone, without DTensor's rule for it."""

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, DTensor) or input.device_mesh.ndim > 1 or not isinstance(self.weight, DTensor):
            return super().forward(input)
        mesh, placement = input.device_mesh, cast(Any, input.placements[0])
        flattened = placement.is_shard() and 0 < placement.dim < input.ndim - 1
        if not flattened or self.weight.placements != (REPLICATED,):
            return super().forward(input)
        shape = torch.Size((*input.shape[:-1], self.out_features))
        weights = [to_shard(tensor) for tensor in (self.weight, self.bias) if tensor is not None]
        return wrap(_linear(to_shard(input), *weights), mesh, placement, shape, contiguous_stride(shape))


@on_each_rank
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias)
