"""Pipelines that are given images or videos beside the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.tiny_models.pipelines.image import flux
from experiments.tiny_models.pipelines.parts import LATENTS, ROTARY, SIZES, TEXT_WIDTH, drawn
from experiments.tiny_models.pipelines.video import wan

if TYPE_CHECKING:  # diffusers is optional: importing this needs it not
    from diffusers import DiffusionPipeline


def _of_wan(**transformer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of a Wan pipeline that all of its kind have, and the sizes of a transformer with some changes."""
    pipeline = wan("2.1")
    parts = {name: pipeline.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    sizes = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    return parts, {**sizes, **transformer}


def wan_image_to_video() -> DiffusionPipeline:
    """The one without an image encoder, as Wan 2.2 has it: first and last frame are latents only."""
    import diffusers

    # Noise, latents of the given frames, and a mask of those for the 4 frames that are one in time.
    parts, sizes = _of_wan(in_channels=16 + 16 + 4)
    return diffusers.WanImageToVideoPipeline(**parts, transformer=drawn(diffusers.WanTransformer3DModel(**sizes)))


def wan_video_to_video() -> DiffusionPipeline:
    import diffusers

    parts, sizes = _of_wan()
    return diffusers.WanVideoToVideoPipeline(**parts, transformer=drawn(diffusers.WanTransformer3DModel(**sizes)))


def wan_vace() -> DiffusionPipeline:
    """Video and mask are inputs of blocks of their own."""
    import diffusers

    parts, sizes = _of_wan(vace_layers=[0], vace_in_channels=2 * 16 + 64)
    return diffusers.WanVACEPipeline(**parts, transformer=drawn(diffusers.WanVACETransformer3DModel(**sizes)))


def flux_inpaint() -> DiffusionPipeline:
    import diffusers

    return diffusers.FluxInpaintPipeline(**flux().components)


def flux_control() -> DiffusionPipeline:
    """The latents of an image of edges or depths are beside those of the image."""
    import diffusers

    transformer = diffusers.FluxTransformer2DModel(
        in_channels=2 * 4 * LATENTS,
        out_channels=4 * LATENTS,
        num_single_layers=1,
        **{**SIZES, "num_layers": 1},
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=ROTARY,
    )
    parts = {
        name: part for name, part in flux().components.items() if name not in ("image_encoder", "feature_extractor")
    }
    return diffusers.FluxControlPipeline(**{**parts, "transformer": drawn(transformer)})
