"""Judge the embedded model: does a reader of handwriting read the digit that was asked for, and does it move so?

The reader is a support vector machine trained on digits that the model has
never seen. What it reads right on clips of real digits is the yardstick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.svm import SVC
from torch import Tensor

from experiments.moving_digits import DIGIT_SIZE, Digits, load_split, render, trajectories
from meshdiff.diffusion.guidance import classifier_free
from meshdiff.diffusion.sampling import SOLVERS, flow_times, sample
from meshdiff.models.digits import WEIGHTS, DigitsModel
from meshdiff.models.digits_prompts import DIRECTIONS, Prompt, parse_prompt

DEFAULT = DigitsModel.DEFAULTS


@dataclass(frozen=True)
class Config:
    """Judge the embedded model over all digits and directions."""

    weights: Path = WEIGHTS
    """Weights of the embedded model."""
    guidance_scales: tuple[float, ...] = (1.0, DEFAULT.guidance_scale)
    """Guidance scales to compare."""
    steps: int = DEFAULT.steps
    """Sampling steps."""
    clips: int = 2
    """Clips of each of the 80 prompts."""


def centroids(clips: Tensor) -> Tensor:
    """(column, row) of the ink's centre in pixels, `[clips, frames, 2]`, of `[clips, 1, frames, height, width]`."""
    ink = ((clips[:, 0] + 1) / 2 - 0.2).clamp(min=0)
    total = ink.sum(dim=(-2, -1)).clamp(min=1e-6)
    columns = (ink.sum(dim=-2) * (torch.arange(clips.shape[-1]) + 0.5)).sum(-1) / total
    rows = (ink.sum(dim=-1) * (torch.arange(clips.shape[-2]) + 0.5)).sum(-1) / total
    return torch.stack([columns, rows], dim=-1)


def features(clips: Tensor) -> Tensor:
    """The reader's input for each frame: a window around the ink's centre, `[clips, frames, 64]`."""
    count, _, frames, height, width = clips.shape
    offsets = torch.arange(DIGIT_SIZE) + 0.5 - DIGIT_SIZE / 2
    center = centroids(clips)
    columns = (center[..., 0:1] + offsets) * (2 / width) - 1
    rows = (center[..., 1:2] + offsets) * (2 / height) - 1
    grid = torch.stack(torch.broadcast_tensors(columns[:, :, None, :], rows[:, :, :, None]), dim=-1)
    flat = clips.transpose(1, 2).flatten(0, 1)
    window = F.grid_sample(flat, grid.flatten(0, 1), mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(window, 2).reshape(count, frames, 64)


def train_reader(held_out: Digits) -> Callable[[Tensor], Tensor]:
    """A function from clips to the digit it reads in most of their frames, `[clips]`."""
    middle = torch.full((len(held_out.labels), 1, 2), 16.0)
    seen = features(render(held_out.images, middle, 32, 32))[:, 0]
    machine = SVC(C=10, gamma="scale").fit(seen.numpy(), held_out.labels.numpy())

    def read(clips: Tensor) -> Tensor:
        frames = features(clips)
        votes = torch.as_tensor(machine.predict(frames.flatten(0, 1).numpy())).reshape(frames.shape[:2])
        return votes.mode(dim=1).values

    return read


def moved_right(clips: Tensor, prompts: list[Prompt]) -> Tensor:
    """True for each clip in which the ink's centre moved in the prompt's direction, of the eight, `[clips]`."""
    path = centroids(clips)
    way = path[:, -1] - path[:, 0]
    compass = F.normalize(torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32), dim=1)
    nearest = (way @ compass.T).argmax(dim=1)
    asked = torch.tensor([list(DIRECTIONS).index(prompt.direction) for prompt in prompts])
    return (nearest == asked) & (way.norm(dim=1) > 2)


@torch.no_grad()
def generate(model: DigitsModel, texts: list[str], scale: float, steps: int, first_seed: int) -> Tensor:
    """Clips of many prompts at once, on this device; the noise of each is that of its own seed."""
    base = replace(DEFAULT, steps=steps, guidance_scale=scale)
    requests = [replace(base, prompt=text, seed=first_seed + i) for i, text in enumerate(texts)]
    words = torch.tensor([parse_prompt(branch).words() for r in requests for branch in r.branches])
    context = model.transformer.encode_text(words)
    rope = model.rope(requests[0])
    branches = len(requests[0].branches)
    combine = classifier_free(scale)

    def velocity(x: Tensor, time: float) -> Tensor:
        tokens = x.repeat_interleave(branches, dim=0)
        velocities = model.transformer(tokens, torch.full((1,), time), context, rope)
        return torch.cat([combine(clip) for clip in velocities.split(branches)])

    noise = torch.cat([model.noise(request) for request in requests])
    clean = sample(velocity, noise, flow_times(steps, DEFAULT.shift), SOLVERS[DEFAULT.solver]())
    return torch.stack([model.decode(clip[None], requests[0]).transpose(0, 1) for clip in clean])


def main(config: Config) -> None:
    learned, held_out = load_split()
    read = train_reader(held_out)
    directions = list(DIRECTIONS)
    prompts = [Prompt(digit, direction, "steadily") for digit in range(10) for direction in directions]
    texts = [f"a {p.digit} moving {p.direction}" for p in prompts]
    labels = torch.tensor([p.digit for p in prompts])

    table = Table("clips", "digit read right", "share of real", "direction right")
    generator = torch.Generator().manual_seed(0)
    indices = [torch.nonzero(learned.labels == p.digit)[:, 0] for p in prompts for _ in range(10)]
    chosen = torch.stack([i[torch.randint(len(i), (1,), generator=generator)[0]] for i in indices])
    repeated = [p for p in prompts for _ in range(10)]
    real = render(learned.images[chosen], trajectories(repeated, 16, 32, 32, generator), 32, 32)
    yardstick = (read(real) == learned.labels[chosen]).float().mean().item()
    table.add_row("real", f"{yardstick:.1%}", "100%", f"{moved_right(real, repeated).float().mean():.1%}")

    model = DigitsModel.load(config.weights)
    work = [(scale, batch) for scale in config.guidance_scales for batch in range(config.clips)]
    right: dict[float, list[Tensor]] = {scale: [] for scale in config.guidance_scales}
    moved: dict[float, list[Tensor]] = {scale: [] for scale in config.guidance_scales}
    for scale, batch in track(work, "making clips", console=Console(stderr=True)):
        clips = generate(model, texts, scale, config.steps, first_seed=1000 * batch)
        right[scale].append(read(clips) == labels)
        moved[scale].append(moved_right(clips, prompts))
    for scale in config.guidance_scales:
        digits, ways = (torch.cat(parts[scale]).float().mean().item() for parts in (right, moved))
        table.add_row(f"guidance {scale:g}", f"{digits:.1%}", f"{digits / yardstick:.1%}", f"{ways:.1%}")
    Console().print(table)
    for digit in range(10):
        scale = config.guidance_scales[-1]
        good = torch.cat([part[labels == digit] for part in right[scale]]).float().mean().item()
        if good < 1:
            print(f"guidance {scale:g}: a {digit} is read right in {good:.0%} of its clips")


if __name__ == "__main__":
    main(tyro.cli(Config))
