"""The shipped weights: a person recognises what they make."""

from __future__ import annotations

import torch

from experiments.evaluate_digits import generate, moved_right, train_reader
from experiments.moving_digits import load_split, render, sample_clips, trajectories
from meshdiff.models.digits import DigitsModel
from meshdiff.models.digits_prompts import DIRECTIONS, Prompt


def test_clips_of_real_digits_stay_on_the_canvas_and_move_as_described():
    generator = torch.Generator().manual_seed(0)
    learned, _ = load_split()
    clips, prompts = sample_clips(learned, 64, 16, 32, 40, generator)
    assert clips.shape == (64, 1, 16, 32, 40)
    assert clips.min() >= -1
    assert clips.max() <= 1
    assert moved_right(clips, prompts).all()
    ink = (clips + 1).sum(dim=(1, 3, 4))
    assert (ink.min(dim=1).values / ink.max(dim=1).values).min() > 0.9  # none is cut off at the border
    centers = trajectories([Prompt(1, "left", "quickly")], 16, 32, 40, generator)
    still = render(learned.images[:1], centers[:, :1].expand(-1, 16, -1), 32, 40)
    assert not moved_right(still, [Prompt(1, "left")]).any()


def test_learned_and_held_out_digits_are_different_drawings():
    learned, held_out = load_split()
    assert len(learned.labels) + len(held_out.labels) == 1797
    same = (learned.images.flatten(1)[:, None] == held_out.images.flatten(1)[None]).all(-1)
    assert same.sum() <= 1  # two identical drawings may happen


def test_prompts_give_their_digit_and_direction():
    prompts = [Prompt(digit, direction) for digit, direction in zip(range(8), DIRECTIONS, strict=True)]
    texts = [f"a {p.digit} moving {p.direction}" for p in prompts]
    clips = generate(DigitsModel.load(), texts, scale=4.0, steps=20, first_seed=0)
    _, held_out = load_split()
    read = train_reader(held_out)(clips)
    assert (read == torch.tensor([p.digit for p in prompts])).sum() >= 7
    assert moved_right(clips, prompts).sum() >= 7
