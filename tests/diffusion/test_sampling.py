from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.distributed.tensor import Shard

from meshdiff import CommsCounter, Layout, init_mesh, simulate
from meshdiff.diffusion.sampling import SOLVERS, flow_times, sample
from meshdiff.distributed.mesh import place
from meshdiff.distributed.simulation import unwrap


def test_times_fall_from_noise_to_data():
    assert flow_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    for shift in (0.5, 3.0, 5.0):
        times = flow_times(10, shift)
        assert times[0] == 1
        assert times[-1] == 0
        assert all(a > b for a, b in pairwise(times))
    assert flow_times(2, 3.0)[1] == pytest.approx(0.75)


def error(solver: str, steps: int) -> float:
    """Of d(x)/d(time) = x * cos(time) from time 1 to 0, whose solution is known."""
    x = torch.ones(1, dtype=torch.float64)
    end = sample(lambda x, time: x * math.cos(time), x, flow_times(steps, 2.0), SOLVERS[solver]())
    return abs(end.item() - math.exp(math.sin(0) - math.sin(1)))


ORDERS = {"euler": 1, "ab2": 2}


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_have_the_order_they_claim(solver):
    measured = math.log2(error(solver, 64) / error(solver, 128))
    assert measured == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_sharded_state_stays_where_it_is(solver):
    x = torch.randn(1, 61, 4)
    run = lambda x: sample(lambda x, time: torch.sin(x) * time, x, flow_times(5, 3.0), SOLVERS[solver]())  # noqa: E731
    with simulate(4):
        mesh = init_mesh(Layout(1, 4), "cpu")
        with CommsCounter(mesh) as comms:
            end = run(place(x, mesh["cp"], [Shard(1)]))
        assert comms.as_dict() == {}
        assert end.placements == (Shard(1),)
        assert torch.equal(unwrap(end.full_tensor()), run(x))


def test_every_step_is_reported():
    seen = []
    sample(lambda x, time: x, torch.ones(1), flow_times(3), SOLVERS["euler"](), seen.append)
    assert seen == [0, 1, 2]
