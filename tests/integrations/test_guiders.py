"""Modular pipelines of diffusers on a mesh, and guiders that change the model between the calls of a step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.guiders import AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import WanBlocks
from ranks import run_on_every_rank
from torch import Tensor

from experiments.tiny_models.pipelines import PIPELINES
from meshdiff import Layout, init_mesh
from meshdiff.autoshard.numerics import difference
from meshdiff.integrations.diffusers import parallelize

SKIPPED = {"indices": [1], "fqn": "blocks"}
GUIDERS = {
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=4.0),
    "skip-layer": lambda: SkipLayerGuidance(
        guidance_scale=4.0,
        skip_layer_config=LayerSkipConfig(**SKIPPED),
        skip_layer_guidance_start=0.1,
        skip_layer_guidance_stop=0.8,
    ),
    "auto": lambda: AutoGuidance(guidance_scale=4.0, auto_guidance_config=LayerSkipConfig(**SKIPPED)),
}
CHANGED = "is changed between the calls of a step (blocks.1._diffusers_hook)"


def build(guider: str) -> Any:
    parts, blocks = PIPELINES["wan"](), WanBlocks()
    for name in [name for name in blocks.sub_blocks if "text_encoder" in name]:
        blocks.sub_blocks.pop(name)
    pipeline = blocks.init_pipeline()
    pipeline.update_components(
        transformer=parts.transformer, vae=parts.vae, scheduler=parts.scheduler, guider=GUIDERS[guider]()
    )
    return pipeline


def clip(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    width = pipeline.transformer.config.text_dim
    prompt, negative = torch.randn(2, 1, 12, width, generator=generator)
    return pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        height=48,
        width=80,
        num_frames=9,
        num_inference_steps=8,
        generator=generator,
        output_type="pt",
        output="videos",
    )


@torch.no_grad()
def on_this_rank() -> dict[str, tuple[float, dict[str, str]]]:
    """By guider and layout: the error of two clips, and why calls were not divided."""
    warnings.simplefilter("ignore")
    found = {}
    for guider in GUIDERS:
        expected = clip(build(guider))
        for layout in (Layout(cp=2), Layout(cfg=2)):
            pipeline = build(guider)
            parallel = parallelize(pipeline, init_mesh(layout, "cpu"))
            error = max(difference(clip(pipeline), expected) for _ in range(2))
            found[f"{guider} {layout}"] = error, parallel.fallbacks()
    return found


def test_guiders_on_real_ranks(tmp_path):
    for found in run_on_every_rank(on_this_rank, 2, tmp_path, timeout=200):
        assert {key: error <= 1e-5 for key, (error, _) in found.items()} == dict.fromkeys(found, True)
        told = {key: why["transformer"] for key, (_, why) in found.items() if why}
        assert told == {"skip-layer cfg2-cp1": CHANGED, "auto cfg2-cp1": CHANGED}


def test_what_is_no_model_is_one_line():
    with pytest.raises(ValueError, match="takes a model or a pipeline of diffusers; given a WanBlocks"):
        parallelize(WanBlocks(), init_mesh(Layout(), "cpu"))
    dist.destroy_process_group()
