"""A tiny Wan checkpoint, runs of it, and what they should send."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from contract import run_traffic
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff import CommsCounter, Layout, Pipeline, Request
from meshdiff.distributed.weight_streaming import ALIGNMENT
from meshdiff.models import WanModel, WanOptions, wan_model
from meshdiff.models.layers import CrossAttention

FLOAT = 4
NEGATIVE = "blurry, low quality"
REQUEST = replace(
    WanModel.DEFAULTS, negative_prompt=NEGATIVE, frames=17, height=16, width=112, steps=8, seed=3, shift=3.0
)
TOKENS = 35  # of that request: 5 x 1 x 7, which neither 2 nor 3 ranks divide
SCALE_2 = 3.0
LEVELS: dict[str, dict[str, bool]] = {
    "plain": {},
    "sharded": {"shard_weights": True},
    "offloaded": {"offload": True, "offload_text": True, "tiles_on_host": True},
    "both": {"shard_weights": True, "offload": True},
}


@cache
def checkpoint(folder: Path, version: str = "2.1") -> Path:
    """The folder that holds both layouts."""
    path = folder / f"wan-{version}"
    if not path.exists():
        from experiments.tiny_models.wan_checkpoint import (  # ranks, which find what the test made, do not have it
            Config,
            write,
        )

        write(Config(out=path, version=version))
    return path


def request(version: str = "2.1") -> Request:
    """8 steps, guidance 5, a negative prompt; of the second expert at another scale."""
    return REQUEST if version == "2.1" else replace(REQUEST, options=WanOptions(guidance_scale_2=SCALE_2))


def make(root: Path, mesh: DeviceMesh, version: str = "2.1", level: str = "plain") -> tuple[Tensor, dict, list[int]]:
    """A clip, what was sent, and how often a prompt was encoded and projected to keys and values."""
    options = dict(LEVELS[level])
    of_model = {name: options.pop(name) for name in ("offload_text", "tiles_on_host") if name in options}
    model = WanModel.open(str(checkpoint(root, version) / "diffusers"), **of_model)
    pipeline = Pipeline(model, mesh, **options)
    encoded, projected, comms = (
        counted(wan_model, "encode_text"),
        counted(CrossAttention, "project"),
        CommsCounter(mesh),
    )
    with encoded, projected, comms:
        video = pipeline.generate(request(version))
    return video, comms.as_dict(), [encoded.calls, projected.calls]


class counted:
    """Counts the calls of an attribute, which go through."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name, self.calls = owner, name, 0

    def __enter__(self) -> counted:
        self.original: Callable = getattr(self.owner, self.name)

        def call(*args, **kwargs):
            self.calls += 1
            return self.original(*args, **kwargs)

        setattr(self.owner, self.name, call)
        return self

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.name, self.original)


def traffic(model: WanModel, layout: Layout, sharded: bool = False, real: bool = True) -> dict:
    """What a run of `REQUEST` sends, of the rank that sends most; real ranks agree before and after as well."""
    sent = run_traffic(layout, model.config, REQUEST, 2, TOKENS)
    text = 2 * wan_model.TEXT_LENGTH * model.config.text_dim * FLOAT
    for dim, ranks in (("cfg", layout.cfg), ("cp", layout.cp)):
        if ranks > 1:
            sent[dim]["broadcast"] = {"count": 1, "bytes": text * (ranks - 1)}
    calls: list[int] = []
    if sharded:
        once, each = (gathers(model.transformers[0], chain, layout) for chain in model.transformers[0].order)
        calls += once + each * REQUEST.steps
    if calls:
        # Where one dim is the world, it is that dim's group that gathers.
        dim = "cp" if layout.cfg == 1 else "cfg" if layout.cp == 1 else "world"
        gathered = sent.setdefault(dim, {}).setdefault("all_gather", {"count": 0, "bytes": 0})
        gathered["count"] += len(calls)
        gathered["bytes"] += sum(calls)
    if real:  # that prompts and VAE could be read, by all ranks along one dim and then along the other
        for dim, ranks, known in (("cp", layout.cp, 1), ("cfg", layout.cfg, layout.cp)):
            if ranks > 1:
                gathered = sent[dim].setdefault("all_gather", {"count": 0, "bytes": 0})
                gathered["count"] += 4  # how long, and what
                gathered["bytes"] += 2 * (8 + len(pickle.dumps([None] * known))) * (ranks - 1)
    return sent


def gathers(transformer: nn.Module, chain: list[str], layout: Layout) -> list[int]:
    """Bytes that a rank sends for each module of a chain, from the sizes of its own weights."""
    ranks, of_text = layout.world_size, transformer.order[0]
    sizes = []
    for name in chain:
        own = sum(
            math.ceil(parameter.numel() * FLOAT / ALIGNMENT) * ALIGNMENT
            for key, parameter in transformer.named_parameters()
            if key.startswith(f"{name}.") and not any(key.startswith(f"{o}.") for o in of_text if o != name)
        )
        sizes.append(math.ceil(own / (ALIGNMENT * ranks)) * ALIGNMENT * (ranks - 1))
    return sizes


@torch.no_grad()
def by_diffusers(root: Path, version: str) -> Tensor:
    """The clip of diffusers' own pipeline, `[frames, channels, height, width]` in [-1, 1]."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(checkpoint(root, version) / "diffusers")
    pipeline.set_progress_bar_config(disable=True)
    asked = request(version)
    frames = pipeline(
        asked.prompt,
        negative_prompt=asked.negative_prompt,
        height=asked.height,
        width=asked.width,
        num_frames=asked.frames,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        guidance_scale_2=asked.options.guidance_scale_2,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="pt",
    ).frames[0]
    return frames * 2 - 1
