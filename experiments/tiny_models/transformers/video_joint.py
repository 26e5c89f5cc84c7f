"""Models of video, and of images as its frames, whose text takes part in the same attention."""

from __future__ import annotations

from typing import Any

import torch

from experiments.tiny_models.transformers.registry import Draw, tiny
from experiments.tiny_models.transformers.video import HEADS, padded, rotation

WIDE: dict[str, Any] = {"num_attention_heads": 5, "attention_head_dim": 16}
"""Heads that can be parted for time, height and width as these models do."""
HUNYUAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "mlp_ratio": 1.5,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 4, 4),
}


@tiny(
    "CogVideoXTransformer3DModel",
    **WIDE,
    in_channels=4,
    out_channels=4,
    time_embed_dim=20,
    ofs_embed_dim=20,
    text_embed_dim=16,
    num_layers=2,
    patch_size_t=2,
    use_rotary_positional_embeddings=True,
)
def cog_video_x(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 10, 4, 10, 14),  # 5 x 5 x 7 tokens
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500]),
        "ofs": torch.tensor([2.0]),
        "image_rotary_emb": rotation(draw, 175, 16),
    }


@tiny(
    "ConsisIDTransformer3DModel",
    **WIDE,
    in_channels=4,
    out_channels=4,
    time_embed_dim=20,
    text_embed_dim=16,
    num_layers=4,
    sample_width=14,
    sample_height=10,
    sample_frames=9,
    max_text_seq_length=11,
    use_rotary_positional_embeddings=True,
    use_learned_positional_embeddings=True,
    is_train_face=True,
    cross_attn_interval=2,
    cross_attn_dim_head=8,
    cross_attn_num_heads=7,
    LFE_id_dim=12,
    LFE_vit_dim=24,
    LFE_depth=2,
    LFE_dim_head=4,
    LFE_num_heads=5,
    LFE_num_id_token=5,
    LFE_num_querie=7,
    LFE_output_dim=53,  # two thirds of 80
    LFE_ff_mult=2,
    LFE_num_scale=2,
)
def consis_id(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 3, 4, 10, 14),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": rotation(draw, 105, 16),
        "id_cond": draw(1, 12),
        "id_vit_hidden": [draw(1, 11, 24), draw(1, 11, 24)],
    }


@tiny(
    "EasyAnimateTransformer3DModel",
    **WIDE,
    in_channels=13,
    out_channels=4,
    patch_size=2,
    num_layers=3,
    mmdit_layers=2,  # the third has the same weights for both
    time_embed_dim=20,
    add_norm_text_encoder=True,
    text_embed_dim=16,
    text_embed_dim_t5=16,
)
def easy_animate(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 3, 10, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_hidden_states_t5": draw(1, 7, 16),
        "inpaint_latents": draw(1, 5, 3, 10, 14),
        "control_latents": draw(1, 4, 3, 10, 14),
    }


@tiny(
    "HunyuanVideoTransformer3DModel",
    **HUNYUAN,
    num_single_layers=2,
    pooled_projection_dim=20,
    image_condition_type="token_replace",  # the blocks without are those of Framepack
)
def hunyuan_video(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 3, 10, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_attention_mask": padded(11, 8).long(),
        "pooled_projections": draw(1, 20),
        "guidance": torch.tensor([6000.0]),
    }


@tiny(
    "HunyuanVideoFramepackTransformer3DModel",
    **HUNYUAN,
    num_single_layers=2,
    pooled_projection_dim=20,
    has_image_proj=True,
    image_proj_dim=12,
    has_clean_x_embedder=True,
)
def hunyuan_video_framepack(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 3, 10, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_attention_mask": padded(11, 8).long(),
        "pooled_projections": draw(1, 20),
        "image_embeds": draw(1, 7, 12),
        "indices_latents": torch.arange(8, 11),
        "guidance": torch.tensor([6000.0]),
        "latents_clean": draw(1, 4, 2, 10, 14),  # 2 x 5 x 7 tokens
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": draw(1, 4, 2, 10, 14),  # 1 x 3 x 4
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": draw(1, 4, 4, 10, 14),  # 1 x 2 x 2
        "indices_latents_history_4x": torch.arange(1, 5),
    }


@tiny(
    "HunyuanVideo15Transformer3DModel",
    **{**HUNYUAN, "in_channels": 9},
    text_embed_2_dim=20,
    image_embed_dim=12,
    use_meanflow=True,
)
def hunyuan_video_15(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 9, 3, 5, 7),
        "timestep": torch.tensor([500.0, 300.0]),
        "encoder_hidden_states": draw(2, 11, 16),
        "encoder_attention_mask": padded(11, 8, 10).long(),
        "timestep_r": torch.tensor([400.0, 100.0]),
        "encoder_hidden_states_2": draw(2, 7, 20),
        "encoder_attention_mask_2": padded(7, 5, 2).long(),
        "image_embeds": draw(2, 5, 12),
    }


@tiny(
    "JoyImageEditTransformer3DModel",
    in_channels=4,
    hidden_size=60,
    num_attention_heads=5,
    text_dim=16,
    mlp_width_ratio=1.5,
    num_layers=2,
    rope_dim_list=[4, 4, 4],
    rope_type="mrope",
)
def joy_image_edit(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 5, 4, 1, 10, 14),  # five images
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
    }


@tiny(
    "JoyImageEditPlusTransformer3DModel",
    in_channels=4,
    hidden_size=60,
    num_attention_heads=5,
    text_dim=16,
    mlp_width_ratio=1.5,
    num_layers=2,
    rope_dim_list=[4, 4, 4],
)
def joy_image_edit_plus(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 47, 4, 1, 2, 2),
        "timestep": torch.tensor([500, 300]),
        "encoder_hidden_states": draw(2, 11, 16),
        "encoder_hidden_states_mask": padded(11, 8, 10).long(),
        "shape_list": [[(1, 5, 7), (1, 3, 4)], [(1, 5, 5), (1, 1, 5)]],  # 47 patches, 30 and 17 of padding
    }


@tiny(
    "MochiTransformer3DModel",
    **HEADS,
    num_layers=3,  # the last one keeps no text
    pooled_projection_dim=24,
    in_channels=4,
    text_embed_dim=16,
    time_embed_dim=16,
)
def mochi(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 4, 3, 10, 14),
        "encoder_hidden_states": draw(2, 11, 16),
        "timestep": torch.tensor([500, 300]),
        "encoder_attention_mask": padded(11, 8, 10),
    }


@tiny(
    "MotifVideoTransformer3DModel",
    **HEADS,
    in_channels=9,
    out_channels=4,
    num_layers=2,
    num_single_layers=3,
    num_decoder_layers=1,
    mlp_ratio=1.5,
    text_embed_dim=16,
    image_embed_dim=12,
    rope_axes_dim=(4, 4, 4),
    enable_text_cross_attention_dual=True,
    enable_text_cross_attention_single=True,
)
def motif_video(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 9, 3, 10, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_attention_mask": padded(11, 8),
        "image_embeds": draw(1, 7, 12),
    }
