"""Gather: every rank sees the full sequence of keys and values, for its own queries.

    key, value   [batch, seq/N, kv_heads, head_dim]
      one all-gather -> [batch, seq, kv_heads, head_dim]     attention of own queries

The simple reference. It suits few heads of key and value (GQA), and needs room
for all of them. Each rank sends its keys and values N-1 times; the gradient
comes back in one all-to-all.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshdiff.attention.block_kernels import wide
from meshdiff.attention.local import attend_rows, in_order, out_of_order
from meshdiff.attention.problem import Problem, count
from meshdiff.attention.seq_head_exchange import all_to_all
from meshdiff.distributed.simulation import on_each_rank
from meshdiff.distributed.torch_compat import all_gather, funcol

__all__ = ["gather"]


def gather(problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """A `meshdiff.attention.strategy.Strategy`, which says what it takes and returns."""
    # Each rank finds a share of every key's gradient. On a CPU the shares are float32, so that they are
    # rounded once and not once a rank; kernels for CUDA want half precision.
    dtype = wide(query.dtype) if query.device.type == "cpu" else query.dtype
    key, value = _Gather.apply(problem, dtype, key, value)
    attended = attend_rows(problem, problem.mesh.get_local_rank(), query.to(dtype), key, value, mask)
    return attended.to(query.dtype)


class _Gather(torch.autograd.Function):
    """Key and value of all ranks; the gradient of each token is the sum over the ranks that saw it."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, dtype: torch.dtype, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ctx.problem, ctx.dtype = problem, key.dtype
        largest = max(map(count, problem.keys))
        gathered = all_gather(_pack(largest, key, value), 0, problem.mesh)
        return _unpack(funcol.wait_tensor(gathered).to(dtype), problem)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        problem, rank = ctx.problem, ctx.problem.mesh.get_local_rank()
        shape = gradients[0].shape
        unit = 2 * shape[0] * shape[2] * shape[3]
        received = all_to_all(
            _pack_gradients(problem, *gradients),
            _own_size(problem, unit, rank),
            [unit * count(tokens) for tokens in problem.keys],
            problem.mesh,
        )
        return None, None, *_sum_gradients(received, problem, rank, shape[0], shape[2], shape[3], ctx.dtype)


@on_each_rank
def _pack(largest: int, key: Tensor, value: Tensor) -> Tensor:
    """`[batch, 2 kv_heads, largest, head_dim]`: an all-gather takes parts of one size."""
    both = torch.cat([key, value], dim=2).transpose(1, 2)
    return F.pad(both, (0, 0, 0, largest - both.shape[2])).contiguous()


@on_each_rank
def _unpack(gathered: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """`[batch, seq, kv_heads, head_dim]`, laid out head by head, as kernels read it fastest."""
    parts = [part[:, :, : count(own)] for part, own in zip(gathered.chunk(problem.ranks), problem.keys, strict=True)]
    key, value = torch.cat(parts, dim=2).transpose(1, 2).chunk(2, dim=2)
    tokens = tuple(chain.from_iterable(problem.keys))
    return in_order(key, tokens), in_order(value, tokens)


@on_each_rank
def _own_size(problem: Problem, unit: int, rank: int) -> list[int]:
    return [unit * count(problem.keys[rank])] * problem.ranks


@on_each_rank
def _pack_gradients(problem: Problem, *gradients: Tensor) -> Tensor:
    tokens = tuple(chain.from_iterable(problem.keys))
    return torch.cat([out_of_order(gradient, tokens) for gradient in gradients], dim=2).transpose(0, 1).reshape(-1)


@on_each_rank
def _sum_gradients(
    received: Tensor,
    problem: Problem,
    rank: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    parts = received.view(problem.ranks, count(problem.keys[rank]), batch, 2 * kv_heads, head_dim)
    return tuple(parts.sum(0, dtype=wide(parts.dtype)).to(dtype).transpose(0, 1).chunk(2, dim=2))
