"""Pipelines of videos."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from experiments.tiny_models.pipelines.parts import (
    CHANNELS,
    LATENTS,
    LATENTS_IN_AND_OUT,
    ROTARY,
    SIZES,
    TEXT_WIDTH,
    WIDTH,
    byte_tokenizer,
    clip,
    drawn,
    drawn_vae,
    flow_matching,
    t5,
    token_ids,
)
from experiments.tiny_models.wan_checkpoint import Config as WanConfig
from experiments.tiny_models.wan_checkpoint import make_pipeline

if TYPE_CHECKING:  # diffusers is optional: importing this needs it not
    from diffusers import DiffusionPipeline


def wan(version: Literal["2.1", "2.2"]) -> DiffusionPipeline:
    config = WanConfig(out=Path(), version=version, heads=5, head_dim=12, text_dim=TEXT_WIDTH)
    with TemporaryDirectory() as folder:
        return make_pipeline(config, Path(folder))


def ltx() -> DiffusionPipeline:
    import diffusers

    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=LATENTS,
        block_out_channels=CHANNELS,
        decoder_block_out_channels=CHANNELS,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        **LATENTS_IN_AND_OUT,
        **SIZES,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
    )
    tokenizer, text_encoder = t5()
    return diffusers.LTXPipeline(
        scheduler=flow_matching(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        vae=drawn_vae(vae),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=drawn(transformer),
    )


def hunyuan_video() -> DiffusionPipeline:
    import diffusers
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaConfig, LlamaModel

    start, pad = "<|begin_of_text|>", "<|pad|>"
    special = [start, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", pad]
    roles = {"bos_token": start, "eos_token": "<|eot_id|>", "pad_token": pad}
    # The pipeline cuts its template off by a number of tokens, so its words must be tokens.
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    tokenizer = byte_tokenizer([template], special, f"{start} $A", **roles)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=4,  # the pipeline skips the last two
        **token_ids(tokenizer),
    )
    tokenizer_2, text_encoder_2 = clip(24)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENTS, block_out_channels=CHANNELS, layers_per_block=1, norm_num_groups=4
    )
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **LATENTS_IN_AND_OUT,
        **SIZES,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=24,
        rope_axes_dim=ROTARY,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=drawn(LlamaModel(llama)),
        tokenizer=tokenizer,
        transformer=drawn(transformer),
        vae=drawn_vae(vae),
        scheduler=flow_matching(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def cogvideox() -> DiffusionPipeline:
    """The larger of the two models, which has rotary positions."""
    import diffusers

    blocks = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": CHANNELS,
    }
    vae = diffusers.AutoencoderKLCogVideoX(
        **blocks, latent_channels=LATENTS, layers_per_block=1, norm_num_groups=4, scaling_factor=0.7
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        **SIZES,
        **LATENTS_IN_AND_OUT,
        time_embed_dim=WIDTH,
        text_embed_dim=TEXT_WIDTH,
        sample_width=14,
        sample_height=10,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing"
    )
    tokenizer, text_encoder = t5()
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=drawn_vae(vae, contrast=0.2),
        transformer=drawn(transformer),
        scheduler=scheduler,
    )


def mochi() -> DiffusionPipeline:
    import diffusers

    channels = (32,) * 4  # its norms have 32 groups
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, layers_per_block=(1,) * 5
    )
    transformer = diffusers.MochiTransformer3DModel(
        **SIZES,
        pooled_projection_dim=48,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=32,
    )
    tokenizer, text_encoder = t5()
    return diffusers.MochiPipeline(
        scheduler=flow_matching(invert_sigmas=True),
        vae=drawn_vae(vae, contrast=0.2),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=drawn(transformer),
    )
