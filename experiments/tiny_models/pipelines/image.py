"""Pipelines of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # diffusers is optional: importing this needs it not
    from diffusers import DiffusionPipeline


def image_vae() -> Any:
    """The VAE of Flux and Stable Diffusion 3."""
    import diffusers

    return drawn_vae(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=CHANNELS,
            latent_channels=LATENTS,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )


def flux() -> DiffusionPipeline:
    """The one that takes its guidance as an input, as FLUX.1-dev does."""
    import diffusers

    tokenizer, text_encoder = clip(24)
    tokenizer_2, text_encoder_2 = t5()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * LATENTS,  # patches of 2 x 2
        num_single_layers=2,
        **SIZES,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=ROTARY,
    )
    return diffusers.FluxPipeline(
        scheduler=flow_matching(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=drawn(transformer),
    )


def sd3() -> DiffusionPipeline:
    """Stable Diffusion 3.5 medium: norms in attention, and a first block that attends to the image twice."""
    import diffusers

    tokenizer, text_encoder = clip(12, projected=True)
    tokenizer_2, text_encoder_2 = clip(20, projected=True)
    tokenizer_3, text_encoder_3 = t5()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=14,
        **LATENTS_IN_AND_OUT,
        **SIZES,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=12 + 20,
        pos_embed_max_size=9,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=drawn(transformer),
        scheduler=flow_matching(shift=3.0),
        vae=image_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def pixart() -> DiffusionPipeline:
    """The one that predicts noise, not a flow, and gives its scheduler the generator of the call."""
    import diffusers

    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32,  # the smallest of which the pipeline knows which aspect ratios it was trained on
        **SIZES,
        in_channels=LATENTS,
        out_channels=2 * LATENTS,  # of which it leaves out the half that would be a variance
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_WIDTH,
    )
    tokenizer, text_encoder = t5()
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=image_vae(),
        transformer=drawn(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def qwen_image() -> DiffusionPipeline:
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * LATENTS,  # patches of 2 x 2
        out_channels=LATENTS,
        **SIZES,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=ROTARY,
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENTS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * LATENTS,
        latents_std=[1.0] * LATENTS,
    )
    shifting = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    pipeline = diffusers.QwenImagePipeline(
        scheduler=flow_matching(**shifting),
        vae=drawn_vae(vae),
        text_encoder=None,
        tokenizer=None,
        transformer=drawn(transformer),
    )

    # The pipeline cuts its template off by a number of tokens, so its words must be tokens; only it knows them.
    end = "<|endoftext|>"
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    special = [end, "<|im_start|>", "<|im_end|>", *vision]
    roles = {"eos_token": "<|im_end|>", "pad_token": end}
    tokenizer = byte_tokenizer([pipeline.prompt_template_encode], special, **roles)
    # Its eyes are as small as they can be: no pipeline here shows it an image.
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            **token_ids(tokenizer),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
        },
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, vision, strict=True)},
    )
    pipeline.register_modules(text_encoder=drawn(Qwen2_5_VLForConditionalGeneration(config)), tokenizer=tokenizer)
    return pipeline
