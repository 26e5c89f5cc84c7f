"""The choice of a strategy for a problem, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from meshdiff.attention.gather import gather
from meshdiff.attention.hybrid import hybrid, members
from meshdiff.attention.problem import Problem, count
from meshdiff.attention.ring import ring
from meshdiff.attention.ulysses import ulysses

__all__ = ["AUTO", "STRATEGIES", "Choice", "Strategy", "choose_strategy"]

Strategy = Callable[[Problem, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of this rank's queries to the keys of all ranks.

It takes a problem; this rank's query `[batch, own tokens, heads, head_dim]`, and key and value, which have `kv_heads`
heads, their tokens in the order of `Problem.queries` and `Problem.keys`: these may give a rank several ranges (joint
sequences); and the full mask, as `whole_mask` returns it, or None. It returns the shape and dtype of query. It is
differentiable for query, key and value, and its collectives are alike on all ranks.
"""

STRATEGIES: dict[str, Strategy] = {"ulysses": ulysses, "ring": ring, "gather": gather, "hybrid": hybrid}
"""Strategies by the name that `strategy` takes."""

AUTO = "auto"
"""The value of `strategy` that leaves the choice to `choose_strategy`."""

FEW_TOKENS = 1024
"""Tokens a rank, below which what a ring's steps cost outweighs the idle ranks of an uneven Ulysses."""


class Choice(NamedTuple):
    """A strategy, and what speaks for it."""

    strategy: str
    reason: str


def choose_strategy(problem: Problem, strategy: str = AUTO) -> Choice:
    """The strategy for a problem: the one that is requested, or the one that suits it.

    It depends on nothing but the problem, which is the same on every rank: free
    memory, say, may differ, and ranks that choose differently wait for ever.

    Raises:
        ValueError: if the strategy that is requested cannot do it, naming one that can.
    """
    size = members(problem.heads, problem.kv_heads, problem.ranks)
    if problem.ranks == 1 and strategy in (AUTO, *STRATEGIES):
        return Choice("ulysses", "one rank holds everything, nothing is sent")
    if strategy in STRATEGIES:
        if strategy == "hybrid" and not 1 < size < problem.ranks:
            whole = "divide them all" if size == problem.ranks else "share no factor with them"
            fitting = "ulysses" if size == problem.ranks else "ring"
            raise ValueError(
                f'strategy="hybrid" needs heads that some of the {problem.ranks} ranks divide; {problem.heads} heads '
                f'({problem.kv_heads} of key and value) {whole}; use strategy="{fitting}"'
            )
        return Choice(strategy, "asked for")
    heads = f"{problem.heads} heads ({problem.kv_heads} of key and value)"
    if problem.kv_heads * problem.ranks <= problem.heads and not problem.is_causal:
        return Choice("gather", f"of {heads} every rank needs most of the latter: gathering them sends least")
    if size == problem.ranks:
        return Choice("ulysses", f"{problem.ranks} ranks divide {heads}, and its exchanges are the smallest")
    idle = -(-problem.heads // problem.ranks) * problem.ranks / problem.heads - 1
    tokens = max(map(count, problem.queries))
    if tokens < FEW_TOKENS:
        return Choice("ulysses", f"{tokens} tokens a rank are too few for the steps of a ring")
    if idle < 0.1:
        return Choice("ulysses", f"{problem.ranks} ranks share out {heads} to within {idle:.0%}")
    if size > 1:
        return Choice(
            "hybrid", f"{heads} on {problem.ranks} ranks are {size} x {problem.ranks // size}: ulysses x ring"
        )
    return Choice("ring", f"{heads} share no factor with {problem.ranks} ranks; ulysses would idle for {idle:.0%}")
