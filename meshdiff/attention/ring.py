"""Ring: keys and values travel from rank to rank, and each rank merges what it has seen.

Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for
Near-Infinite Context", arXiv:2310.01889. Blocks are merged by their
log-sum-exp, as in Dao et al., "FlashAttention", arXiv:2205.14135.

    step 0    own keys and values           | the next block is on its way
    step 1    those of the rank before      | while this one is attended to
    ...
    step N-1  those of the rank after

A rank never holds more than two blocks, whatever the number of heads. Backward
the blocks go round once more, with their gradients, which go one step further
and so come home.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meshdiff.attention.block_kernels import accumulator, attend_block, attend_block_backward, merge, wide
from meshdiff.attention.local import both
from meshdiff.attention.masks import causal, part
from meshdiff.attention.problem import Problem, count
from meshdiff.distributed.simulation import on_each_rank
from meshdiff.distributed.torch_compat import funcol

__all__ = ["ring"]

SWALLOWS = 2**25
"""Float32 numbers of this size are 4 apart."""


def ring(problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """A `meshdiff.attention.strategy.Strategy`, which says what it takes and returns."""
    if mask is not None and mask.is_floating_point():
        mask, swallowed = _shift_mask(problem, problem.mesh.get_local_rank(), mask)
        query = _blank(query, swallowed)
    return _Ring.apply(problem, query, key, value, mask)


@on_each_rank
def _shift_mask(problem: Problem, rank: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """An additive mask whose highest entry of each row is 0, which leaves attention as it is.

    A row of nothing but -1e9 or the dtype's lowest number would swallow the
    log-sum-exp by which blocks are merged. It swallows the logits as well, so
    that such a query sees all its keys alike: as a query of zeros does.

    Returns:
        The mask, and which of this rank's queries are swallowed, `[batch or 1, seq or 1, heads or 1, 1]`.
    """
    mask = mask.to(wide(mask.dtype))
    if problem.is_causal and min(mask.shape[2:]) > 1:
        seen = causal((range(mask.shape[2]),), (range(mask.shape[3]),), mask.device)
        mask = mask if isinstance(seen, bool) else mask.masked_fill(~seen, -torch.inf)
    highest = mask.amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    swallowed = part(highest, None, problem.queries[rank], None) < -SWALLOWS
    return mask - highest, swallowed.transpose(1, 2)


@on_each_rank
def _blank(query: Tensor, swallowed: Tensor) -> Tensor:
    return query.masked_fill(swallowed, 0)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rank = problem.mesh.get_local_rank()
        output, lse = _nothing_seen(query)
        block = _pack(key, value)
        for step in range(problem.ranks):
            following = _rotate(block, problem, step, rank) if step + 1 < problem.ranks else block
            output, lse = _forward_step(problem, step, rank, output, lse, query, block, mask)
            block = funcol.wait_tensor(following)
        ctx.problem = problem
        ctx.save_for_backward(query, key, value, mask, output.to(wide(query.dtype)), lse.to(wide(query.dtype)))
        return _to_tokens(output, query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        problem, rank = ctx.problem, ctx.problem.mesh.get_local_rank()
        query, key, value, mask, output, lse = ctx.saved_tensors
        of_query: Tensor = torch.zeros_like(output)
        arriving: Tensor | None = None
        block = _pack(key, value)
        for step in range(problem.ranks):
            following = _rotate(block, problem, step, rank) if step + 1 < problem.ranks else block
            share, of_block = _backward_step(problem, step, rank, gradient, query, block, mask, output, lse)
            of_query = of_query + share
            # What earlier ranks found arrives while this one computes its own share.
            of_block = of_block if arriving is None else of_block + funcol.wait_tensor(arriving)
            arriving = _rotate(of_block, problem, step, rank)
            block = funcol.wait_tensor(following)
        of_key, of_value = _unpack_home(problem, rank, funcol.wait_tensor(arriving), key)
        return None, _to_tokens(of_query, query), of_key, of_value, None


def _rotate(block: Tensor, problem: Problem, step: int, rank: int) -> Tensor:
    """Start sending this step's block to the next rank, and receiving the one that the rank before holds."""
    return funcol.all_to_all_single(
        block,
        output_split_sizes=_split(problem, step, rank, -1),
        input_split_sizes=_split(problem, step, rank, +1),
        group=problem.mesh,
    )


@on_each_rank
def _split(problem: Problem, step: int, rank: int, towards: int) -> list[int]:
    """Sizes of the messages to, or from, each rank: all but one are empty."""
    ranks, tokens = problem.ranks, [count(own) for own in problem.keys]
    # Before the first step a rank holds its own block; after each, the one before.
    held = (rank - step) % ranks
    unit = 2 * problem.batch * problem.kv_heads * problem.head_dim
    sizes = [0] * ranks
    sizes[(rank + towards) % ranks] = unit * tokens[held if towards > 0 else (held - 1) % ranks]
    return sizes


@on_each_rank
def _nothing_seen(query: Tensor) -> tuple[Tensor, Tensor]:
    batch, seq, heads, head_dim = query.shape
    output = query.new_zeros(batch, heads, seq, head_dim, dtype=accumulator(query.dtype))
    return output, output.new_full((batch, heads, seq), -torch.inf)


@on_each_rank
def _pack(key: Tensor, value: Tensor) -> Tensor:
    """A block as it travels: `[2, batch, kv_heads, seq, head_dim]`, flat."""
    return torch.stack([key.transpose(1, 2), value.transpose(1, 2)]).view(-1)


def _block(problem: Problem, step: int, rank: int, block: Tensor, mask: Tensor | None) -> Any:
    """Key and value of this step, and the mask for them; None if no query sees them."""
    queries, keys = problem.queries[rank], problem.keys[(rank - step) % problem.ranks]
    seen = causal(queries, keys, block.device) if problem.is_causal else True
    if seen is False or not count(queries) or not count(keys):
        return None
    key, value = block.view(2, problem.batch, problem.kv_heads, count(keys), problem.head_dim)
    return key, value, both(None if mask is None else part(mask, None, queries, keys), seen)


@on_each_rank
def _forward_step(
    problem: Problem,
    step: int,
    rank: int,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    block: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp after one more block."""
    visible = _block(problem, step, rank, block, mask)
    if visible is None:
        return output, lse
    key, value, seen = visible
    return merge(output, lse, *attend_block(query.transpose(1, 2), key, value, seen, problem.scale))


@on_each_rank
def _backward_step(
    problem: Problem,
    step: int,
    rank: int,
    gradient: Tensor,
    query: Tensor,
    block: Tensor,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """This rank's share of the gradients of its queries, and of this step's block."""
    visible = _block(problem, step, rank, block, mask)
    if visible is None:
        return torch.zeros_like(output), torch.zeros_like(block, dtype=wide(block.dtype))
    key, value, seen = visible
    of_query, of_key, of_value = attend_block_backward(
        gradient.transpose(1, 2), query.transpose(1, 2), key, value, seen, output, lse, problem.scale
    )
    return of_query, torch.stack([of_key, of_value]).view(-1)


@on_each_rank
def _to_tokens(output: Tensor, like: Tensor) -> Tensor:
    """`[batch, seq, heads, head_dim]` from `[batch, heads, seq, head_dim]`."""
    return output.transpose(1, 2).to(like.dtype).contiguous()


@on_each_rank
def _unpack_home(problem: Problem, rank: int, block: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    of_key, of_value = block.view(2, problem.batch, problem.kv_heads, count(problem.keys[rank]), problem.head_dim)
    return of_key.transpose(1, 2).to(like.dtype), of_value.transpose(1, 2).to(like.dtype)
