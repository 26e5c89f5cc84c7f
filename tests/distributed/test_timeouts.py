"""Ranks wait for one that does not come for as long as they were told to, whatever group of a mesh they wait in."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import start_on_ranks
from torch.distributed.device_mesh import DeviceMesh

from meshdiff import Layout, init_mesh
from meshdiff.distributed.mesh import ranks_of_replica, ring_of_groups
from meshdiff.distributed.world import store

SECONDS = 2


@pytest.mark.serial
def test_every_group_of_a_mesh_has_the_time_out_of_the_run(tmp_path):
    ranks = start_on_ranks(on_this_rank, 4, tmp_path, world=False)
    assert ranks.exit_codes == [0] * 4, ranks
    waited = [torch.load(ranks.results[rank]) for rank in (0, 1, 2)]
    assert {name for of_rank in waited for name in of_rank} == {"cfg", "cp", "replica", "ring"}
    assert all(SECONDS / 2 < seconds < SECONDS * 5 for of_rank in waited for seconds in of_rank.values()), waited


def groups() -> dict[str, DeviceMesh]:
    """Of two layouts of four ranks: those that rank 3 is in."""
    timeout = timedelta(seconds=SECONDS)
    mesh = init_mesh(Layout(cfg=2, cp=2), "cpu", timeout)
    several, line = init_mesh(Layout(dp=2, cfg=1, cp=2), "cpu"), init_mesh(Layout(cp=4), "cpu")
    ring = ring_of_groups(line["cp"], 2)
    return {"cfg": mesh["cfg"], "cp": mesh["cp"], "replica": ranks_of_replica(several), "ring": ring["ring"]}


def on_this_rank() -> dict[str, float]:
    """Seconds that this rank waits for rank 3 in each of the groups of both."""
    waited, own = {}, groups()
    for name, mesh in own.items():
        if 3 in mesh.mesh.flatten().tolist() and dist.get_rank() != 3:
            began = time.monotonic()
            try:
                dist.all_gather_object([None] * mesh.size(), 0, group=mesh.get_group())
            except RuntimeError:
                waited[name] = time.monotonic() - began
    store().set(f"ended/{dist.get_rank()}", "")
    store().wait([f"ended/{rank}" for rank in range(4)], timedelta(seconds=60))
    return waited
