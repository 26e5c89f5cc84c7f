"""Attention that needs nothing from other ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.placement_types import Placement

from meshdiff.simulation import on_each_rank

__all__ = ["attend_locally", "from_shard", "scaled_dot_product_attention"]


@on_each_rank
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of plain tensors `[batch, seq, heads, head_dim]`, by torch's own kernels."""
    if query.numel() == 0:
        # A rank without heads: torch's CPU kernel divides by their number. The sums are
        # there for the gradients, which are zero but have to arrive.
        return query + key.sum() + value.sum()
    seq = query.shape[1]
    if query.device.type == "cpu":
        # The CPU kernel takes queries in blocks, and a last block of fewer than 4 rows goes to a matrix
        # product that adds up in another order: a shard's result would depend on its length.
        query = F.pad(query, (0, 0, 0, 0, 0, -seq % 4))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)[:, :seq].contiguous()


def attend_locally(query: DTensor, key: DTensor, value: DTensor) -> DTensor:
    """Attention of each rank's own shards.

    Left to DTensor, `F.scaled_dot_product_attention` would quietly gather
    them, and gather differently on each kind of device.

    Args:
        query: `[batch, seq, heads, head_dim]`, sharded by heads or by sequence.
        key, value: placed alike for a shard of the heads; whole on every rank
            for a shard of the query's sequence.

    Returns:
        A DTensor of query's shape, placed as query.
    """
    attended = scaled_dot_product_attention(*(_ToShard.apply(tensor) for tensor in (query, key, value)))
    return from_shard(attended, query.device_mesh, query.placements[0], query.shape, query.stride())


def from_shard(
    shard: Tensor, mesh: DeviceMesh, placement: Placement, shape: torch.Size, stride: tuple[int, ...]
) -> DTensor:
    """A DTensor of the given global shape and stride, of which this rank holds `shard`."""
    return DTensor.from_local(shard, mesh, [placement], run_check=False, shape=shape, stride=stride)


class _ToShard(torch.autograd.Function):
    """This rank's part of a DTensor.

    Unlike `DTensor.to_local`, it knows that every rank's gradient of a whole
    tensor is only its share of it, and it does not guess the gradient's global
    stride from a shard, which is wrong where ranks hold uneven ones.
    """

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        placement = tensor.placements[0]
        ctx.placement = Partial() if placement.is_replicate() else placement
        ctx.whole = tensor.device_mesh, tensor.shape, tensor.stride()
        local = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        mesh, shape, stride = ctx.whole
        return from_shard(gradient, mesh, ctx.placement, shape, stride)
