from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from meshdiff import CommsCounter, Layout, init_mesh, simulate
from meshdiff.diffusion.guidance import classifier_free, divide_branches, run_branches
from meshdiff.distributed.mesh import place
from meshdiff.distributed.simulation import on_each_rank, unwrap

SEQ, CHANNELS = 11, 3
X = torch.linspace(-1, 1, SEQ * CHANNELS).reshape(1, SEQ, CHANNELS)


def branches_on(layout: Layout, branches: int, disturb=lambda velocity, mesh: velocity):
    """Velocities of a model that multiplies tokens by its branch's context, and the traffic."""
    context = torch.arange(1.0, branches + 1).reshape(branches, 1, 1)
    with simulate(layout.world_size):
        mesh = init_mesh(layout, "cpu")
        x = place(X, mesh, [Replicate(), Shard(1)])
        divided = divide_branches(place(context, mesh["cp"], [Replicate()]), mesh)
        with CommsCounter(mesh) as comms:
            velocities = run_branches(lambda t, c: disturb(t * c, mesh), x, divided, branches)
        assert velocities.placements == (Replicate(), Shard(1))
        return unwrap(velocities.full_tensor()), comms.as_dict()


@pytest.mark.parametrize("branches", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cp", [1, 2])
def test_any_number_of_branches_on_any_number_of_cfg_ranks(branches, cp):
    expected = X * torch.arange(1.0, branches + 1).reshape(branches, 1, 1)
    for cfg in range(1, branches + 1):
        velocities, comms = branches_on(Layout(cfg, cp), branches)
        assert torch.equal(velocities, expected), cfg
        slots = -(-branches // cfg)
        sent = slots * -(-SEQ // cp) * CHANNELS * 4 * (cfg - 1)
        assert comms == ({"cfg": {"all_gather": {"count": 1, "bytes": sent}}} if cfg > 1 else {})


def test_a_branch_that_is_wrong_on_one_rank_is_noticed():
    @on_each_rank
    def wrong_on_rank_one(local, rank):
        return local + 1e-3 if rank == 1 else local

    def disturb(velocity, mesh):
        local = wrong_on_rank_one(velocity.to_local(), mesh.get_local_rank("cfg"))
        return type(velocity).from_local(
            local, velocity.device_mesh, velocity.placements, shape=velocity.shape, stride=velocity.stride()
        )

    good, _ = branches_on(Layout(3, 1), 3)
    bad, _ = branches_on(Layout(3, 1), 3, disturb)
    assert [not torch.equal(g, b) for g, b in zip(good, bad, strict=True)] == [False, True, False]


def test_classifier_free_guidance():
    prompt, negative = torch.tensor([[[2.0]]]), torch.tensor([[[1.0]]])
    both = torch.cat([prompt, negative])
    assert classifier_free(3.0)(both).item() == 1 + 3 * (2 - 1)
    assert classifier_free(0.0)(both).item() == 1
    assert torch.equal(classifier_free(1.0)(prompt), prompt)
