"""A model of random weights and any size, to measure with: its clips are noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshdiff.diffusion.request import Request
from meshdiff.errors import InputError
from meshdiff.models.digits import DigitsModel
from meshdiff.models.digits_prompts import VOCABULARY
from meshdiff.models.video_dit import VideoDiT, VideoDiTConfig

__all__ = ["RandomModel", "RandomShape"]


@dataclass(frozen=True)
class RandomShape:
    """The shape of a model of random weights."""

    dim: int = 512
    """Of --model random: channels of the transformer."""
    depth: int = 4
    """Of --model random: blocks."""
    heads: int = 8
    """Of --model random: attention heads; each takes an even number of the channels."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}", f"{getattr(self, name)} given, needs at least 1")
        if self.dim % (2 * self.heads) or self.dim // self.heads < 6:
            raise InputError(
                "--heads", f"{self.heads} given; --dim {self.dim} is to give each head an even number, at least 6"
            )


class RandomModel(DigitsModel):
    """The embedded model's transformer in another size, with random weights that are the same in every process.

    It takes the same prompts, and clips of any size.
    """

    def __init__(self, shape: RandomShape) -> None:
        config = VideoDiTConfig(
            dim=shape.dim, depth=shape.depth, heads=shape.heads, ffn_dim=4 * shape.dim, vocabulary=VOCABULARY
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(VideoDiT(config).eval().requires_grad_(False))

    def prepare(self, request: Request) -> Request:
        """The request with nothing left open; raises `InputError` for sizes that are no multiples of a patch."""
        request = self.check(request)
        for name, patch in zip(self.SIZES, self.config.patch, strict=True):
            if getattr(request, name) % patch:
                raise InputError(f"--{name}", f"{getattr(request, name)} given, needs a multiple of {patch}")
        return request
