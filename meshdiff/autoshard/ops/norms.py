"""Norms whose numbers are of all rows: the moments of every rank's rows are brought together, in one all-gather.

Moments of parts are joined as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances" (1979), which loses nothing where the mean is large.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshdiff.attention.problem import chunk_sizes
from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dtensor_utils import is_differentiated, is_sharded, own_copy, sharded_dim
from meshdiff.autoshard.registry import Handlers, by_shard
from meshdiff.distributed.local_shards import contiguous_stride, to_shard, wrap
from meshdiff.distributed.simulation import on_each_rank
from meshdiff.distributed.torch_compat import all_gather, funcol

__all__ = ["HANDLERS"]

HANDLERS = Handlers()


@HANDLERS.of(F.group_norm)
def _group_norm(
    ctx: ShardingContext,
    input: DTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """A group norm `[batch, channels, ...]` over a dim that is sharded after the channels."""
    dim = sharded_dim(input)
    if dim is None or dim < 2 or is_differentiated(input, weight, bias) or any(map(is_sharded, (weight, bias))):
        return NotImplemented
    if input.shape[1] % num_groups:
        return NotImplemented
    if ctx.recorder is not None:
        ctx.recorder.on_function("group_norm")
    row = input.shape[1] // num_groups * math.prod(n for i, n in enumerate(input.shape[2:], start=2) if i != dim)
    counts = [row * rows for rows in chunk_sizes(input.shape[dim], ctx.mesh.size())]
    ctx.materialize(input)
    own = [None if tensor is None else own_copy(tensor, ctx.mesh) for tensor in (weight, bias)]
    with ctx.unguarded():
        shard = to_shard(input)
        moments = funcol.wait_tensor(all_gather(_moments(shard, num_groups), 0, ctx.mesh))
        local = _normalized(shard, moments, counts, num_groups, eps, *own)
    return wrap(local, ctx.mesh, input.placements[0], input.shape, contiguous_stride(input.shape))


@on_each_rank
def _moments(shard: Tensor, groups: int) -> Tensor:
    """Means and variances `[1, 2, batch, groups]` of this rank's rows; zeros for no rows."""
    dtype = torch.promote_types(shard.dtype, torch.float32)
    if not shard.numel():
        return shard.new_zeros((1, 2, shard.shape[0], groups), dtype=dtype)
    of_groups = shard.reshape(shard.shape[0], groups, -1).to(dtype)
    variance, mean = torch.var_mean(of_groups, dim=-1, correction=0)
    return torch.stack([mean, variance]).unsqueeze(0)


@on_each_rank
def _normalized(
    shard: Tensor,
    moments: Tensor,
    counts: list[int],
    groups: int,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """This rank's rows by the moments of all, `[ranks, 2, batch, groups]`, of as many numbers as `counts` says."""
    share = torch.tensor(counts, dtype=moments.dtype, device=moments.device).view(-1, 1, 1) / sum(counts)
    means, variances = moments[:, 0], moments[:, 1]
    mean = (share * means).sum(dim=0)
    variance = (share * (variances + (means - mean).square())).sum(dim=0)
    channels, ones = shard.shape[1], (1,) * (shard.ndim - 2)
    scale = (variance + eps).rsqrt().repeat_interleave(channels // groups, dim=1)
    mean = mean.repeat_interleave(channels // groups, dim=1)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    scale, shift = (tensor.view(shard.shape[0], channels, *ones) for tensor in (scale, shift))
    dtype = F.group_norm(shard.new_zeros((1, groups, 2)), groups).dtype  # another one under autocast
    return torch.addcmul(shift, shard, scale).to(dtype).contiguous()


@HANDLERS.of(F.batch_norm)
def _batch_norm(
    ctx: ShardingContext,
    input: DTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """A batch norm by moments that are known: each row for itself."""
    dim, others = sharded_dim(input), (running_mean, running_var, weight, bias)
    if dim is None or dim == 1 or training or is_differentiated(input, *others) or any(map(is_sharded, others)):
        return NotImplemented
    if ctx.recorder is not None:
        ctx.recorder.on_function("batch_norm")
    own = [None if tensor is None else own_copy(tensor, ctx.mesh) for tensor in others]
    return by_shard(ctx, input, input.shape, F.batch_norm, *own, False, momentum, eps)
