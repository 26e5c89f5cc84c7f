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
    """Of every pipeline: the larger error of two calls, and every rank's traffic of the second.

    Further the number of steps, the error after `remove`, and what ran on replicated tensors in the autoencoder. That
    and text encoders are on the mesh for more than two ranks: two are also those of `cfg`, and so is what they send.
    """
    logging.set_verbosity_error()
    world = dist.get_world_size()
    mesh = init_mesh(Layout(cfg=2, cp=world // 2) if world % 2 == 0 else Layout(cp=world), "cpu")
    results: dict[str, Any] = {}
    for name, build in PIPELINES.items():
        pipeline = build()
        pipeline.set_progress_bar_config(disable=True)
        expected = call(pipeline, name)
        parallel = parallelize(pipeline, mesh, shard_text=world > 2, shard_vae=world > 2)
        first = call(pipeline, name)
        with CommsCounter(mesh) as comms:
            second = call(pipeline, name)
        error = max(difference(one, expected) for one in (first, second))
        parts = [part for part in parallel.autoencoders.values() if part.was_called]
        replicated = [row for part in parts for row in [*part.replicated_kinds, *part.report().gathers()]]
        assert bool(parts) == (world > 2), f"{name}: {parts}"
        assert any(encoder.was_called for encoder in parallel.encoders.values()) == (world > 2), name
        parallel.remove()
        again = difference(call(pipeline, name), expected)
        steps = CALLS[name]["num_inference_steps"]
        results[name] = error, all_gather_object(comms.as_dict()), steps, again, replicated
    results["guidance"] = all_gather_object(guided(mesh["cfg"])) if world % 2 == 0 else None
    return results


def call(pipeline: DiffusionPipeline, name: str) -> Tensor:
    output = pipeline(**CALLS[name], generator=torch.Generator().manual_seed(0), return_dict=False)[0]
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
