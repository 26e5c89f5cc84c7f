from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from meshdiff import CommsCounter, Layout, init_mesh, simulate
from meshdiff.distributed.mesh import place

NUMEL = 64 * 4  # of a float32 tensor: 1,024 bytes


def counted(change) -> dict:
    """The traffic of `change`, given a (cfg 2, cp 4) mesh and a `[64, 4]` tensor."""
    with simulate(8):
        mesh = init_mesh(Layout(2, 4), "cpu")
        with CommsCounter(mesh) as comms:
            change(mesh, torch.randn(64, 4))
        return comms.as_dict()


def test_what_dtensor_gathers_without_being_asked_is_counted():
    def mixed_placements(mesh, x):
        place(x, mesh["cp"], [Shard(0)]) + place(x, mesh["cp"], [Shard(1)])

    assert sum(t["bytes"] for t in counted(mixed_placements)["cp"].values()) > 0


def test_each_collective_by_mesh_dim_with_what_one_rank_sends():
    x_bytes = 64 * 4 * 4

    def gather(mesh, x):
        place(x, mesh, [Shard(0), Replicate()]).full_tensor()

    assert counted(gather) == {"cfg": {"all_gather": {"count": 1, "bytes": x_bytes // 2}}}

    def reduce(mesh, x):
        DTensor.from_local(x, mesh, [Replicate(), Partial()], run_check=False).full_tensor()

    assert counted(reduce) == {"cp": {"all_reduce": {"count": 1, "bytes": 2 * x_bytes * 3 // 4}}}

    def scatter_sum(mesh, x):
        DTensor.from_local(x, mesh["cp"], [Partial()], run_check=False).redistribute(placements=[Shard(0)])

    assert counted(scatter_sum) == {"cp": {"reduce_scatter": {"count": 1, "bytes": x_bytes * 3 // 4}}}


def test_plain_collectives_are_counted_too():
    def plain(mesh, x):
        dist.all_reduce(x.clone(), group=mesh.get_group("cp"))
        dist.broadcast(x.clone(), src=0)

    assert counted(plain) == {
        "cp": {"all_reduce": {"count": 1, "bytes": 2 * 1024 * 3 // 4}},
        "world": {"broadcast": {"count": 1, "bytes": 1024 * 7}},
    }


def test_nothing_sent_is_nothing_counted():
    assert counted(lambda mesh, x: place(x, mesh["cp"], [Shard(0)]) * 2) == {}
