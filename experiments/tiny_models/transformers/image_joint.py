"""Models of images that attend to text and image together, from weights of their own (as MMDiT does)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from experiments.tiny_models.transformers.registry import Draw, tiny


def _positions(*lengths: int) -> Tensor:
    """The positions of all cells of a grid, row by row."""
    return torch.cartesian_prod(*(torch.arange(length) for length in lengths))


@tiny(
    "AuraFlowTransformer2DModel",
    sample_size=14,
    in_channels=4,
    num_mmdit_layers=2,
    num_single_dit_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    caption_projection_dim=60,
    pos_embed_max_size=81,
)
def aura_flow(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "encoder_hidden_states": draw(1, 7, 16),  # and 8 registers, which the model puts before them
        "timestep": torch.tensor([0.5]),
    }


@tiny(
    "BriaFiboTransformer2DModel",
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    guidance_embeds=True,
    axes_dims_rope=[4, 4, 4],
    text_encoder_dim=20,
)
def bria_fibo(draw: Draw) -> dict[str, Any]:
    keys = torch.arange(46)
    keys = (keys < 8) | (keys >= 11)  # of the text, then of the image
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "text_encoder_layers": [draw(1, 11, 20) for _ in range(4)],  # one for each block
        "timestep": torch.tensor([500.0]),
        "guidance": torch.tensor([5.0]),
        "img_ids": _positions(1, 5, 7),
        "txt_ids": torch.zeros(11, 3, dtype=torch.long),
        "joint_attention_kwargs": {"attention_mask": keys.expand(1, 1, 46, 46)},
    }


@tiny(
    "BriaTransformer2DModel",
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    axes_dims_rope=[4, 4, 4],  # and no guidance: the model cannot build what would embed it
)
def bria(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500.0]),
        "img_ids": _positions(1, 5, 7),
        "txt_ids": torch.zeros(11, 3, dtype=torch.long),
        "controlnet_block_samples": [draw(1, 35, 60)],
    }


@tiny(
    "ChromaTransformer2DModel",
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    axes_dims_rope=(4, 4, 4),
    approximator_num_channels=16,
    approximator_hidden_dim=20,
    approximator_layers=2,
)
def chroma(draw: Draw) -> dict[str, Any]:
    keys = torch.arange(46)
    keys = (keys < 8) | (keys >= 11)  # of the text, then of the image
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": _positions(1, 5, 7),
        "txt_ids": torch.zeros(11, 3, dtype=torch.long),
        "attention_mask": keys[None],
        "controlnet_block_samples": [draw(1, 35, 60)],
        "controlnet_single_block_samples": [draw(1, 35, 60)],
    }


@tiny(
    "CogView3PlusTransformer2DModel",
    in_channels=4,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    out_channels=4,
    text_embed_dim=16,
    time_embed_dim=16,
    condition_dim=4,
    pos_embed_max_size=9,
    sample_size=14,
)
def cog_view_3_plus(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500]),
        "original_size": torch.tensor([[80.0, 112.0]]),
        "target_size": torch.tensor([[80.0, 112.0]]),
        "crop_coords": torch.tensor([[3.0, 0.0]]),
    }


@tiny(
    "CogView4Transformer2DModel",
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    text_embed_dim=16,
    time_embed_dim=16,
    condition_dim=4,
    pos_embed_max_size=9,
    sample_size=14,
    rope_axes_dim=(16, 16),
)
def cog_view_4(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500]),
        "original_size": torch.tensor([[80.0, 112.0]]),
        "target_size": torch.tensor([[80.0, 112.0]]),
        "crop_coords": torch.tensor([[3.0, 0.0]]),
        "attention_mask": torch.arange(11)[None] < 8,
    }


@tiny(
    "Flux2Transformer2DModel",
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=5,
    joint_attention_dim=16,
    timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
def flux_2(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": _positions(1, 5, 7, 1),
        "txt_ids": _positions(1, 1, 1, 11),
    }


@tiny(
    "Flux3Transformer2DModel",
    in_channels=8,
    cond_in_channels=6,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=5,
    joint_attention_dim=16,
    timestep_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
    flow_map=True,
)
def flux_3(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 7, 16),
        "timestep": torch.tensor([0.5]),
        "target_timestep": torch.tensor([0.25]),
        "img_ids": _positions(1, 5, 7, 1),
        "txt_ids": _positions(1, 1, 1, 7),
        "image_cond_hidden_states": draw(1, 25, 6),
        "image_cond_ids": _positions(1, 5, 5, 1) + torch.tensor([10, 0, 0, 0]),
    }


@tiny(
    "FluxTransformer2DModel",
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    pooled_projection_dim=20,
    guidance_embeds=True,
    axes_dims_rope=(4, 4, 4),
)
def flux(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "pooled_projections": draw(1, 20),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": _positions(1, 5, 7),
        "txt_ids": torch.zeros(11, 3, dtype=torch.long),
        "controlnet_block_samples": [draw(1, 35, 60)],
        "controlnet_single_block_samples": [draw(1, 35, 60)],
    }


@tiny(
    "GlmImageTransformer2DModel",
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    text_embed_dim=16,
    time_embed_dim=16,
    condition_dim=4,
    prior_vq_quantizer_codebook_size=13,
)
def glm_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "encoder_hidden_states": draw(1, 11, 16),
        "prior_token_id": torch.arange(35)[None] % 13,
        "prior_token_drop": torch.arange(35)[None] % 5 == 0,
        "timestep": torch.tensor([500]),
        "target_size": torch.tensor([[80.0, 112.0]]),
        "crop_coords": torch.tensor([[3.0, 0.0]]),
        "attention_mask": torch.arange(11)[None] < 8,
    }


@tiny(
    "HiDreamImageTransformer2DModel",
    patch_size=2,
    in_channels=4,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    caption_channels=[16, 20],
    text_emb_dim=24,
    num_routed_experts=5,
    num_activated_experts=2,
    axes_dims_rope=(4, 4, 4),
    max_resolution=(10, 14),
    llama_layers=[0, 1, 1, 2],
)
def hi_dream_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 8, 14),  # 4 x 7 tokens; not a square, so padded to the 35 of the resolution
        "timesteps": torch.tensor([500]),
        "encoder_hidden_states_t5": draw(1, 4, 16),
        "encoder_hidden_states_llama3": draw(3, 1, 11, 20),
        "pooled_embeds": draw(1, 24),
    }


@tiny(
    "HunyuanImageTransformer2DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=5,
    attention_head_dim=12,
    num_layers=2,
    num_single_layers=2,
    num_refiner_layers=2,
    patch_size=(2, 2),
    guidance_embeds=True,
    text_embed_dim=16,
    text_embed_2_dim=20,
    rope_axes_dim=(6, 6),
    use_meanflow=True,
)
def hunyuan_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 4, 10, 14),
        "timestep": torch.tensor([500.0, 250.0]),
        "timestep_r": torch.tensor([400.0, 0.0]),
        "guidance": torch.tensor([3500.0, 1000.0]),
        "encoder_hidden_states": draw(2, 7, 16),
        "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [5]]),
        "encoder_hidden_states_2": draw(2, 5, 20),
        "encoder_attention_mask_2": torch.arange(5) < torch.tensor([[2], [5]]),
    }


@tiny(
    "LongCatImageTransformer2DModel",
    in_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    axes_dims_rope=[4, 4, 4],
)
def long_cat_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": _positions(1, 5, 7) + torch.tensor([1, 11, 11]),
        "txt_ids": torch.tensor([0, 1, 1]) * torch.arange(11)[:, None],
    }


@tiny(
    "OvisImageTransformer2DModel",
    in_channels=8,
    out_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    axes_dims_rope=(4, 4, 4),
)
def ovis_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": _positions(1, 5, 7),
        "txt_ids": torch.tensor([0, 1, 1]) * torch.arange(11)[:, None],
    }


@tiny(
    "QwenImageTransformer2DModel",
    in_channels=8,
    out_channels=2,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    axes_dims_rope=(4, 4, 4),
    zero_cond_t=True,
    use_additional_t_cond=True,
)
def qwen_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 47, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_hidden_states_mask": torch.arange(11)[None] < 8,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 5, 7), (1, 3, 4)]],  # what is made, and what it is made from
        "additional_t_cond": torch.tensor([1]),
        "controlnet_block_samples": [draw(1, 47, 60)],
    }
