"""Train the embedded model on moving handwritten digits and write the weights that the package ships.

About 80 minutes on two CPU cores. The shipped weights come from a run that was prolonged twice,
each time with a learning rate that falls again:

    python -m experiments.train_digits --checkpoint state.pt --steps 1200
    python -m experiments.train_digits --checkpoint state.pt --steps 1500
    python -m experiments.train_digits --checkpoint state.pt --steps 2300
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from experiments.moving_digits import load_split, sample_clips
from meshdiff.models.digits_prompts import Prompt
from meshdiff.models.layers import rope_3d
from meshdiff.models.video_dit import VideoDiT, VideoDiTConfig, initialize
from meshdiff.models.wan import patchify

# (share of the steps, frames, height, width). Short clips cost half as much and teach
# shapes and directions just as well; the other sizes make size a run-time choice.
SIZES = ((0.40, 8, 32, 32), (0.45, 16, 32, 32), (0.05, 24, 32, 32), (0.05, 16, 32, 48), (0.05, 16, 48, 32))


@dataclass(frozen=True)
class Config:
    """Training of the embedded model; one straight run by default."""

    out: Path = Path("digits.safetensors")
    """File to write the weights to, as float16."""
    steps: int = 2300
    """Optimizer steps."""
    tokens: int = 4096
    """Tokens in a batch; the number of clips follows from their size."""
    lr: float = 1.5e-3
    """Peak learning rate, after 50 steps of warm-up; falls to zero over the last quarter."""
    ema: float = 0.995
    """Decay of the weight average that is written."""
    dropout: float = 0.1
    """Share of clips whose prompt is emptied; each single word goes missing as often again."""
    shift: float = 3.0
    """Time shift, as at sampling: above 1, more of the training is spent on noisy clips."""
    seed: int = 0
    """Seed of everything random."""
    checkpoint: Path | None = None
    """Save the training state here every 50 steps, and go on from it if it exists."""


def drop_words(prompt: Prompt, share: float, generator: torch.Generator) -> Prompt:
    """Empty the prompt with probability `share`; else drop each of its words with that probability."""
    whole, digit, direction, speed = (torch.rand(4, generator=generator) >= share).tolist()
    return Prompt(
        prompt.digit if whole and digit else None,
        prompt.direction if whole and direction else None,
        prompt.speed if whole and speed else None,
    )


def learning_rate(step: int, config: Config) -> float:
    """Warm up, stay, fall: the last part can be started whenever there is no more time."""
    return config.lr * min(1.0, (step + 1) / 50, 4 * (config.steps - step) / config.steps)


def draw_batch(config: Config, digits, generator: torch.Generator):
    """Clips as tokens, their rotary tables, and their prompts as words."""
    shares = torch.tensor([size[0] for size in SIZES])
    _, frames, height, width = SIZES[int(torch.multinomial(shares, 1, generator=generator))]
    patch = VideoDiTConfig.patch
    grid = (frames // patch[0], height // patch[1], width // patch[2])
    batch = config.tokens // (grid[0] * grid[1] * grid[2])
    video, prompts = sample_clips(digits, batch, frames, height, width, generator)
    words = torch.tensor([drop_words(p, config.dropout, generator).words() for p in prompts])
    return patchify(video, patch), rope_3d(grid, VideoDiTConfig().head_dim), words


def flow_loss(model: VideoDiT, clean: Tensor, words: Tensor, rope, shift: float, generator: torch.Generator) -> Tensor:
    """Squared error of the velocity at a random time of each clip."""
    time = torch.randn(len(clean), generator=generator).sigmoid()  # logit-normal
    time = shift * time / (1 + (shift - 1) * time)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = torch.lerp(clean, noise, time[:, None, None])
    target = (noisy - clean) / time.clamp(min=model.TIME_FLOOR)[:, None, None]
    return F.mse_loss(model(noisy, time, model.encode_text(words), rope), target)


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    digits, _ = load_split()
    model = VideoDiT(VideoDiTConfig())
    initialize(model)
    average = copy.deepcopy(model).requires_grad_(False)
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True
    )
    first = 0
    if config.checkpoint and config.checkpoint.exists():
        state = torch.load(config.checkpoint)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
    smooth, start = 1.0, time.perf_counter()
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        clean, rope, words = draw_batch(config, digits, generator)
        loss = flow_loss(model, clean, words, rope, config.shift, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # A short memory at first, or the average would keep the random start.
        keep = min(config.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        smooth = 0.98 * smooth + 0.02 * float(loss)
        bar.set_postfix(loss=f"{smooth:.4f}", minutes=f"{(time.perf_counter() - start) / 60:.1f}")
        last = step + 1 == config.steps
        if config.checkpoint and ((step + 1) % 50 == 0 or last):
            torch.save(
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "step": step + 1,
                },
                config.checkpoint,
            )
        if (step + 1) % 50 == 0 or last:
            save_file({name: t.half().contiguous() for name, t in average.state_dict().items()}, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
