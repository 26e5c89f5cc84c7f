"""Sampling from noise to data along a learned flow, on state that stays on its ranks.

The flow is `x = (1 - time) * data + time * noise`, time falling from 1 to 0;
the model gives the velocity d(x)/d(time). Every update is elementwise, so the
state may be a DTensor with any placement and nothing is sent.

Lipman et al., "Flow Matching for Generative Modeling", arXiv:2210.02747;
Liu et al., "Flow Straight and Fast" (rectified flow), arXiv:2209.03003.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

from torch import Tensor

__all__ = ["SOLVERS", "AdamsBashforth2", "Euler", "Solver", "flow_times", "sample"]


def flow_times(steps: int, shift: float = 1.0) -> list[float]:
    """`steps + 1` times from 1 to 0, evenly spaced and then shifted towards noise.

    The shift is that of Esser et al., "Scaling Rectified Flow Transformers",
    arXiv:2403.03206, eq. 23, which Wan uses: `shift * t / (1 + (shift - 1) * t)`.
    """
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * time / (1 + (shift - 1) * time) for time in even]


class Solver(Protocol):
    """An integrator of the flow, for one run: it may remember earlier steps."""

    def step(self, x: Tensor, velocity: Tensor, time: float, next_time: float) -> Tensor:
        """The state at `next_time`, by one velocity: a method of several evaluations a step does not fit.

        It is elementwise, so that nothing is sent, whatever the placement.

        Args:
            x: the state at `time`, any shape and placement.
            velocity: d(x)/d(time) there, of the same shape and placement.
            time, next_time: from 1, noise, to 0; `next_time` is the smaller one.

        Returns:
            The shape and placement of `x`.
        """


class Euler:
    """First-order solver: the velocity is constant during the step."""

    def step(self, x: Tensor, velocity: Tensor, time: float, next_time: float) -> Tensor:
        return x + (next_time - time) * velocity


class AdamsBashforth2:
    """Second-order solver with one evaluation a step: the velocity is extrapolated linearly from the last two.

    Adams-Bashforth with a variable step (Hairer, Norsett & Wanner, "Solving
    Ordinary Differential Equations I", III.5). The first step is Euler's.
    """

    def __init__(self) -> None:
        self.previous: tuple[Tensor, float] | None = None

    def step(self, x: Tensor, velocity: Tensor, time: float, next_time: float) -> Tensor:
        step = next_time - time
        mean = velocity
        if self.previous is not None:
            previous_velocity, previous_time = self.previous
            mean = velocity + (step / 2 / (time - previous_time)) * (velocity - previous_velocity)
        self.previous = velocity, time
        return x + step * mean


SOLVERS: dict[str, Callable[[], Solver]] = {"euler": Euler, "ab2": AdamsBashforth2}
"""Solvers by the name that `--solver` takes. Wan has one more, `UniPC` in `meshdiff.models.wan_model`."""


def sample(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: list[float],
    solver: Solver,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate the flow over `times`, from `x` at the first of them.

    Args:
        velocity: the model, guidance included, at a state and a time.
        x: the state, any shape and placement.
        times: see `flow_times`.
        solver: a fresh one; solvers remember earlier steps.
        on_step: called after each step with its number, from 0.

    Returns:
        The state at the last time, placed as `x`.
    """
    for index, (time, next_time) in enumerate(pairwise(times)):
        x = solver.step(x, velocity(x, time), time, next_time)
        if on_step is not None:
            on_step(index)
    return x
