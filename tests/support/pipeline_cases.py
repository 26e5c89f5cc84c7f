"""Tiny pipelines of diffusers, on real ranks and on one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn
from unseen import unseen

from experiments.tiny_models.pipelines import CALLS, PIPELINES
from meshdiff import CommsCounter, Layout, init_mesh
from meshdiff.autoshard import Guidance
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.integrations.diffusers import parallelize


def of_pipelines() -> dict[str, Any]:
    """Of each pipeline, from each rank: errors of two calls, traffic of the second, the error once it is off the mesh.

    Last, what ran on replicated tensors in the autoencoder. That and text encoders are on the mesh for more than two
    ranks: two are also those of `cfg`, and so is what they send. A tiny autoencoder takes longer than all other parts
    together: where it is not on the mesh, rank 0 alone decodes, in the second call, and the others compare latents.
    """
    logging.set_verbosity_error()
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_mesh(Layout(cfg=2, cp=world // 2) if world % 2 == 0 else Layout(cp=world), "cpu")
    shares = world > 2
    last = "pt" if shares or rank == 0 else "latent"
    results: dict[str, Any] = {}
    for name, build in PIPELINES.items():
        pipeline = build()
        pipeline.set_progress_bar_config(disable=True)
        expected = {kind: call(pipeline, name, kind) for kind in {"latent", "pt" if rank == 0 else "latent"}}
        parallel = parallelize(pipeline, mesh, shard_text=shares, shard_vae=shares)
        errors = [difference(call(pipeline, name, "latent"), expected["latent"])]
        with CommsCounter(mesh) as comms:
            made = call(pipeline, name, last)
        if shares:
            same = all(torch.equal(made, other) for other in all_gather_object(made))
            assert same, f"{name}: ranks have different images"
        if last in expected:
            errors.append(difference(made, expected[last]))
        assert all(encoder.was_called for encoder in parallel.encoders.values()), name
        parts = [part for part in parallel.autoencoders.values() if part.was_called]
        replicated = [row for part in parts for row in [*part.replicated_kinds, *part.report().gathers()]]
        assert bool(parts) == shares, f"{name}: {parts}"
        parallel.remove()
        again = difference(call(pipeline, name, "latent"), expected["latent"])
        results[name] = all_gather_object((errors, comms.as_dict(), again, replicated))
    results["guidance"] = all_gather_object(guided(mesh["cfg"])) if world % 2 == 0 else None
    return results


def call(pipeline: DiffusionPipeline, name: str, output_type: str) -> Tensor:
    flags = CALLS[name] | {"output_type": output_type}
    output = pipeline(**flags, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    return torch.stack(list(output)) if isinstance(output, list) else output


class Mixing(nn.Module):
    """Rows of a batch know of each other, and how often it ran is counted."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.mixes, self.runs = mixes, unseen(times=0)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        self.runs.get().times += 1
        return (hidden_states * 2 + (hidden_states.mean() if self.mixes else 0),)


def guided(mesh: Any) -> dict[str, Any]:
    """What happens to calls that come together, alone, three at a time, and to batches, on two ranks."""
    found: dict[str, Any] = {}
    x, y, z = (torch.full((1, 3), float(value)) for value in (1, 2, 3))
    model = Mixing()
    guidance = Guidance(model, mesh)
    model(x)  # the first call of a kind is not deferred
    model.runs.get().times = 0
    first, second = model(x)[0], model(y)[0]
    found["together"] = (first + second).tolist(), model.runs.get().times
    first = model(x)[0]
    looked = first.tolist()
    found["alone"] = looked, model.runs.get().times
    outputs = [model(value)[0] for value in (x, y, z)]
    found["three"] = sum(outputs).tolist(), model.runs.get().times
    own = x.clone()
    first = model(own)[0]
    own.fill_(100)
    found["written after"] = first.tolist(), model.runs.get().times
    guidance.remove()
    mixing = Mixing(mixes=True)
    Guidance(mixing, mesh)
    found["batch"] = [mixing(torch.cat([x, z]))[0].tolist() for _ in range(2)]
    return found
