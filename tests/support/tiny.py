"""A model small enough to run on many simulated ranks in a test, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from meshdiff import CommsCounter, DigitsModel, Layout, Pipeline, Request, init_mesh
from meshdiff.models.digits_prompts import VOCABULARY
from meshdiff.models.video_dit import VideoDiT, VideoDiTConfig

DEPTH = 2
PROMPTS = ["a 7 moving left", "", "a 3 moving up", "a 5", "moving down quickly"]
REQUEST = Request("a 7 moving left", frames=10, height=40, width=32, steps=3)
TOKENS = 100  # of that request


@contextmanager
def alone() -> Iterator[None]:
    """A world of this one process, several times faster than a simulation of one, which ends."""
    try:
        yield
    finally:
        dist.destroy_process_group()


def tiny_model(heads: int = 6, dim: int = 48) -> DigitsModel:
    torch.manual_seed(0)
    transformer = VideoDiT(VideoDiTConfig(dim=dim, depth=DEPTH, heads=heads, ffn_dim=64, vocabulary=VOCABULARY))
    return DigitsModel(transformer.requires_grad_(False))


def combine(velocities: torch.Tensor) -> torch.Tensor:
    """A combine function that treats every branch differently."""
    weights = torch.linspace(1.5, -0.5, velocities.shape[0]).tolist()
    return sum(weight * branch for weight, branch in zip(weights, velocities.split(1), strict=True))


def make(layout: Layout, branches: int, request: Request = REQUEST, heads: int = 6, **options: bool | str):
    """A clip on a mesh of that layout, and what was sent; run it inside `simulate` or on real ranks."""
    mesh = init_mesh(layout, "cpu")
    pipeline = Pipeline(tiny_model(heads), mesh, **options)
    with CommsCounter(mesh) as comms:
        video = pipeline.generate(request, branches=PROMPTS[:branches], combine=combine)
    return video, comms.as_dict()
