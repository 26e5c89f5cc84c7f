"""Pipelines that make audio, alone or with a video."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.tiny_models.pipelines.parts import (
    LATENTS,
    LATENTS_IN_AND_OUT,
    SIZES,
    TEXT_WIDTH,
    byte_tokenizer,
    drawn,
    drawn_vae,
    flow_matching,
    t5,
    token_ids,
)

if TYPE_CHECKING:  # diffusers is optional: importing this needs it not
    from diffusers import DiffusionPipeline

SAMPLING_RATE = 1600
"""Samples per second: one that no library has as its default."""


def stable_audio() -> DiffusionPipeline:
    import diffusers
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    tokenizer, text_encoder = t5()
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=LATENTS,
        sampling_rate=SAMPLING_RATE,
    )
    drawn(vae).decoder.conv2.weight_g.data.mul_(0.1)  # amplitudes beyond 1 would be clipped
    transformer = diffusers.StableAudioDiTModel(
        sample_size=201,  # a second of latents, which 2 does not divide
        **LATENTS_IN_AND_OUT,
        **{**SIZES, "num_attention_heads": 4},
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        cross_attention_input_dim=TEXT_WIDTH,
        global_states_input_dim=2 * TEXT_WIDTH,
    )
    return diffusers.StableAudioPipeline(
        vae=vae,
        text_encoder=text_encoder,
        projection_model=drawn(StableAudioProjectionModel(TEXT_WIDTH, TEXT_WIDTH, 0, 2)),
        tokenizer=tokenizer,
        transformer=drawn(transformer),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
        ),
    )


def ltx2() -> DiffusionPipeline:
    """Video and audio, which attend to each other."""
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    special = ["<pad>", "<eos>", "<bos>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = byte_tokenizer([], special, "<bos> $A", **roles)
    config = Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            **token_ids(tokenizer),
        },
        # As small as it can be: no pipeline here shows it an image.
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=3,
        eoi_token_index=4,
        image_token_index=5,
    )
    connectors = LTX2TextConnectors(
        caption_channels=TEXT_WIDTH,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_type="split",
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=LATENTS,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(True,),
        upsample_factor=(2,),
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1, 1, 2),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        sample_rate=SAMPLING_RATE,
        mel_hop_length=16,
        mel_bins=8,
    )
    transformer = diffusers.LTX2VideoTransformer3DModel(
        **LATENTS_IN_AND_OUT,
        **SIZES,
        cross_attention_dim=80,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=5,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=40,
        audio_sampling_rate=SAMPLING_RATE,
        audio_hop_length=16,
        caption_channels=TEXT_WIDTH,
        rope_type="split",
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * 8,
        hidden_channels=16,
        upsample_kernel_sizes=[8, 4],
        upsample_factors=[8, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=SAMPLING_RATE,
    )
    return diffusers.LTX2Pipeline(
        scheduler=flow_matching(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        vae=drawn_vae(vae),
        audio_vae=drawn(audio_vae),
        text_encoder=drawn(Gemma3ForConditionalGeneration(config)),
        tokenizer=tokenizer,
        connectors=drawn(connectors),
        transformer=drawn(transformer),
        vocoder=drawn(vocoder),
    )
