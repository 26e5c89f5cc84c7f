"""Tiny versions of the pipelines of diffusers: every part there, random weights, vocabularies made on the spot.

They stand in for checkpoints of gigabytes, in tests and to try the program: same classes, same calls, no meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch

from experiments.tiny_models.pipelines import audio, conditioned, image, video
from experiments.tiny_models.wan_checkpoint import silence_libraries

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["CALLS", "PIPELINES", "WITH_FILES"]


def seeded(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """Make a builder draw the same numbers every time, and leave the global generator as it was."""

    @wraps(build)
    def wrapped() -> DiffusionPipeline:
        silence_libraries()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipeline = build()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return wrapped


PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {
    "wan": seeded(partial(video.wan, "2.1")),
    "wan22": seeded(partial(video.wan, "2.2")),
    "ltx": seeded(video.ltx),
    "hunyuan-video": seeded(video.hunyuan_video),
    "cogvideox": seeded(video.cogvideox),
    "mochi": seeded(video.mochi),
    "flux": seeded(image.flux),
    "sd3": seeded(image.sd3),
    "pixart": seeded(image.pixart),
    "qwen-image": seeded(image.qwen_image),
}
"""Builders; what they return is new and the same every time."""

WITH_FILES: dict[str, Callable[[], DiffusionPipeline]] = {
    "wan-i2v": seeded(conditioned.wan_image_to_video),
    "wan-v2v": seeded(conditioned.wan_video_to_video),
    "wan-vace": seeded(conditioned.wan_vace),
    "flux-inpaint": seeded(conditioned.flux_inpaint),
    "flux-control": seeded(conditioned.flux_control),
    "stable-audio": seeded(audio.stable_audio),
    "ltx2": seeded(audio.ltx2),
}
"""Builders of pipelines that take images or videos, or make audio."""

TEXT = {
    "prompt": "a small cat walking on green grass",
    "negative_prompt": "a dog, blurred",
    "max_sequence_length": 13,
    "output_type": "pt",
}
# 5 x 7 patches in every frame and an odd number of frames: no even number of ranks divides the tokens.
SIZE = {"height": 80, "width": 112}
VIDEO = {**TEXT, **SIZE, "num_frames": 9, "num_inference_steps": 3}
IMAGE = {**TEXT, **SIZE, "num_inference_steps": 3}

CALLS: dict[str, dict[str, Any]] = {
    "wan": {**VIDEO, "guidance_scale": 4.0},
    "wan22": {**VIDEO, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
    "ltx": {**VIDEO, "height": 160, "width": 224, "num_frames": 17, "guidance_scale": 4.0},
    "hunyuan-video": {**VIDEO, "guidance_scale": 6.0, "true_cfg_scale": 3.0},
    "cogvideox": {**VIDEO, "guidance_scale": 4.0},
    "mochi": {**VIDEO, "num_frames": 13, "guidance_scale": 4.0},
    "flux": {**IMAGE, "guidance_scale": 3.5, "true_cfg_scale": 3.0},
    "sd3": {**IMAGE, "guidance_scale": 4.0},
    "pixart": {**IMAGE, "guidance_scale": 4.0, "use_resolution_binning": False},
    "qwen-image": {**IMAGE, "true_cfg_scale": 4.0},
}
"""A short call of each pipeline, guided; `generator` is the caller's."""
