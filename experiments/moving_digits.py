"""Clips of real handwritten digits that move: what the embedded model is trained and judged on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from meshdiff.models.digits_prompts import DIRECTIONS, SPEEDS, Prompt

DIGIT_SIZE = 16
"""Side of a digit in pixels."""
TRAVEL = dict(zip(SPEEDS, (0.35, 0.65, 0.95), strict=True))
"""Share of the free way across the canvas that a digit covers during a clip."""


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: `images` float32 `[n, 8, 8]` in [0, 1] and their `labels`, int64 `[n]`."""

    images: Tensor
    labels: Tensor


def load_split() -> tuple[Digits, Digits]:
    """scikit-learn's digits as (those the model learns from, those held out for the judge)."""
    data = load_digits()
    split = train_test_split(data.images / 16, data.target, test_size=0.4, random_state=0, stratify=data.target)
    images_train, images_held, labels_train, labels_held = (torch.as_tensor(part) for part in split)
    return Digits(images_train.float(), labels_train), Digits(images_held.float(), labels_held)


def render(images: Tensor, centers: Tensor, height: int, width: int) -> Tensor:
    """Draw digits at sub-pixel positions.

    Args:
        images: `[batch, 8, 8]` in [0, 1].
        centers: (column, row) of the digit's centre in pixels, `[batch, frames, 2]`.
        height, width: of the canvas in pixels.

    Returns:
        Clips `[batch, 1, frames, height, width]` in [-1, 1]; ink is 1.
    """
    batch, frames = centers.shape[:2]
    columns = (torch.arange(width) + 0.5 - centers[..., 0:1]) * (2 / DIGIT_SIZE)  # [batch, frames, width]
    rows = (torch.arange(height) + 0.5 - centers[..., 1:2]) * (2 / DIGIT_SIZE)
    grid = torch.stack(
        torch.broadcast_tensors(columns[:, :, None, :], rows[:, :, :, None]), dim=-1
    )  # [batch, frames, height, width, 2]
    source = images[:, None].repeat_interleave(frames, dim=0)
    ink = F.grid_sample(source, grid.flatten(0, 1), mode="bicubic", padding_mode="zeros", align_corners=False)
    # The 8x8 originals are blurry at this size; a steeper tone curve makes strokes crisp.
    edge = ((ink - 0.15) / 0.55).clamp(0, 1)
    crisp = edge * edge * (3 - 2 * edge)
    return (2 * crisp - 1).reshape(batch, 1, frames, height, width)


def trajectories(prompts: list[Prompt], frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Straight paths that stay on the canvas, `[batch, frames, 2]` in pixels, as the prompts ask."""
    free = torch.tensor([width - DIGIT_SIZE, height - DIGIT_SIZE], dtype=torch.float32)
    steps = torch.tensor([DIRECTIONS[p.direction] for p in prompts], dtype=torch.float32)
    share = torch.tensor([TRAVEL[p.speed] for p in prompts])
    way = steps * (share * free.min())[:, None]
    # The middle of the path keeps half the way from either border.
    slack = free - way.abs()
    middle = DIGIT_SIZE / 2 + way.abs() / 2 + slack * torch.rand(len(prompts), 2, generator=generator)
    phase = torch.linspace(-0.5, 0.5, frames)
    return middle[:, None] + way[:, None] * phase[None, :, None]


def sample_clips(
    digits: Digits, batch: int, frames: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, list[Prompt]]:
    """Random clips `[batch, 1, frames, height, width]` in [-1, 1] and the prompts that describe them."""
    index = torch.randint(len(digits.labels), (batch,), generator=generator)
    directions = torch.randint(len(DIRECTIONS), (batch,), generator=generator).tolist()
    speeds = torch.randint(len(SPEEDS), (batch,), generator=generator).tolist()
    names = list(DIRECTIONS)
    prompts = [
        Prompt(label, names[direction], SPEEDS[speed])
        for label, direction, speed in zip(digits.labels[index].tolist(), directions, speeds, strict=True)
    ]
    centers = trajectories(prompts, frames, height, width, generator)
    return render(digits.images[index], centers, height, width), prompts
