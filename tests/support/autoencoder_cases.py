"""Tiny autoencoders of diffusers, whose rows are shared by real ranks."""

from __future__ import annotations

import torch.distributed as dist

from experiments.tiny_models.autoencoders import AUTOENCODERS
from experiments.tools.autoencoders_coverage import Outcome, outcomes
from meshdiff import Layout, init_mesh
from meshdiff.autoshard import halo
from meshdiff.distributed.consensus import all_gather_object


def on_ranks() -> list[dict[str, dict[str, Outcome]]]:
    """The outcomes of all on all ranks of this world, of every rank."""
    mesh = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"]
    return all_gather_object({name: outcomes(name, mesh) for name in AUTOENCODERS})


def with_a_rank_that_is_off() -> list[dict[str, Outcome]]:
    """Of every rank, while rank 0 sends its neighbour other rows than it has."""
    packed = halo._packed
    if dist.get_rank() == 0:
        halo._packed = lambda *args: packed(*args) + 1
    return all_gather_object(outcomes("AutoencoderKL", init_mesh(Layout(cp=2), "cpu")["cp"]))
