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

    A tiny autoencoder takes longer than all other parts together, and is on no mesh: every rank compares latents, and
    rank 0 in the second call the images instead.
    """
    logging.set_verbosity_error()
    world = dist.get_world_size()
    mesh = init_mesh(Layout(cfg=2, cp=world // 2) if world % 2 == 0 else Layout(cp=world), "cpu")
    last = "latent" if dist.get_rank() else "pt"
    results: dict[str, Any] = {}
    for name, build in PIPELINES.items():
        pipeline = build()
        pipeline.set_progress_bar_config(disable=True)
        expected = {kind: call(pipeline, name, kind) for kind in {"latent", last}}
        parallel = parallelize(pipeline, mesh)
        errors = [difference(call(pipeline, name, "latent"), expected["latent"])]
        with CommsCounter(mesh) as comms:
            errors.append(difference(call(pipeline, name, last), expected[last]))
        parallel.remove()
        again = difference(call(pipeline, name, "latent"), expected["latent"])
        results[name] = all_gather_object((errors, comms.as_dict(), again))
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
