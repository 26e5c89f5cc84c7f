"""Models of images: one sequence of everything, or an image that attends to text from outside."""

from __future__ import annotations

from typing import Any

import torch

from experiments.tiny_models.transformers.registry import Draw, tiny


@tiny(
    "BriaFibo2Transformer2DModel",
    in_channels=4,
    patch_size=2,
    dim=60,
    n_layers=3,
    n_refiner_layers=1,
    n_heads=5,
    cap_feat_dim=16,
    injection_layer_ids=(1,),
    perceiver_num_layers=1,
    min_num_gist_tokens=5,
    max_num_gist_tokens=11,
    gist_step=1,
    gist_min_text_len=3,
    gist_max_text_len=11,
    axes_dims=(4, 4, 4),
    axes_lens=(32, 16, 16),
)
def bria_fibo_2(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 4, 10, 14),
        "timestep": torch.tensor([0.5, 0.25]),
        "encoder_hidden_states": draw(2, 2, 11, 16),  # for the gist, and for the one layer that sees the text itself
        "encoder_attention_mask": torch.arange(11) < torch.tensor([[11], [7]]),  # gists of unequal lengths: a mask
        "context_latents": [draw(2, 4, 6, 8)],  # 12 tokens more
    }


@tiny(
    "DiTTransformer2DModel",
    num_attention_heads=5,
    attention_head_dim=12,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    sample_size=10,
    num_embeds_ada_norm=10,
)
def dit(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 10, 10),  # has to be a square
        "timestep": torch.tensor([5]),
        "class_labels": torch.tensor([3]),
    }


@tiny(
    "DreamLiteTransformer2DModel",
    num_attention_heads=5,
    attention_head_dim=12,
    in_channels=10,
    num_layers=2,
    norm_num_groups=5,
    cross_attention_dim=16,
    use_linear_projection=True,
    qk_norm="rms_norm",
)
def dream_lite(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 10, 5, 7),
        "encoder_hidden_states": draw(1, 11, 16),
        "attention_mask": torch.arange(35)[None] < 31,
        "encoder_attention_mask": torch.arange(11)[None] < 8,
    }


@tiny(
    "ErnieImageTransformer2DModel",
    hidden_size=60,
    num_attention_heads=5,
    num_layers=2,
    ffn_hidden_size=24,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    text_in_dim=16,
    rope_axes_dim=(4, 4, 4),
)
def ernie_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 4, 10, 14),
        "timestep": torch.tensor([500.0, 250.0]),
        "text_bth": draw(2, 12, 16),  # 47 tokens together
        "text_lens": torch.tensor([12, 7]),
    }


@tiny(
    "HunyuanDiT2DModel",
    num_attention_heads=5,
    attention_head_dim=12,
    in_channels=4,
    patch_size=2,
    sample_size=14,
    hidden_size=60,
    num_layers=4,  # the least of which one skips to another
    mlp_ratio=2.0,
    cross_attention_dim=20,
    cross_attention_dim_t5=16,
    pooled_projection_dim=20,
    text_len=8,
    text_len_t5=11,
)
def hunyuan_dit(draw: Draw) -> dict[str, Any]:
    angles = draw(35, 6).repeat_interleave(2, dim=-1)
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, 8, 20),
        "text_embedding_mask": torch.arange(8)[None] < 5,
        "encoder_hidden_states_t5": draw(1, 11, 16),
        "text_embedding_mask_t5": torch.arange(11)[None] < 8,
        "image_meta_size": torch.tensor([[80, 112, 80, 112, 0, 3]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


@tiny(
    "Ideogram4Transformer2DModel",
    in_channels=8,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    intermediate_size=24,
    adaln_dim=16,
    llm_features_dim=20,
    mrope_section=(2, 2, 2),
)
def ideogram_4(draw: Draw) -> dict[str, Any]:
    text = torch.arange(12)
    padding = torch.cat([text < 3, torch.zeros(35, dtype=torch.bool)])[None]  # before the text, with its segment
    positions = torch.cat([text[:, None].expand(12, 3), torch.cartesian_prod(*map(torch.arange, (1, 5, 7))) + 12])
    return {
        "hidden_states": draw(1, 47, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 47, 20),
        "position_ids": positions[None],
        "segment_ids": torch.where(padding, -1, 1),
        "indicator": torch.where(padding, -1, torch.tensor([3] * 12 + [2] * 35)),  # 3 is text, 2 is image
    }


@tiny(
    "Krea2Transformer2DModel",
    in_channels=8,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    num_key_value_heads=1,
    intermediate_size=24,
    timestep_embed_dim=16,
    text_hidden_dim=20,
    num_text_layers=3,
    text_num_attention_heads=5,
    text_num_key_value_heads=5,
    text_intermediate_size=24,
    num_layerwise_text_blocks=1,
    num_refiner_text_blocks=1,
    axes_dims_rope=(4, 4, 4),
)
def krea_2(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 35, 8),
        "encoder_hidden_states": draw(1, 11, 3, 20),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.cat(
            [torch.zeros(11, 3, dtype=torch.long), torch.cartesian_prod(*map(torch.arange, (1, 5, 7)))]
        ),
        "encoder_attention_mask": torch.arange(11)[None] < 8,
    }


@tiny(
    "Lumina2Transformer2DModel",
    sample_size=14,
    in_channels=4,
    hidden_size=60,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=5,
    num_kv_heads=1,
    multiple_of=8,
    ffn_dim_multiplier=0.25,
    axes_dim_rope=(4, 4, 4),
    axes_lens=(16, 16, 16),
    cap_feat_dim=16,
)
def lumina_2(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 4, 10, 14),
        "timestep": torch.tensor([0.5, 0.25]),
        "encoder_hidden_states": draw(2, 13, 16),
        "encoder_attention_mask": torch.arange(13) < torch.tensor([[12], [7]]),  # 47 and 42 tokens with the image
    }


@tiny(
    "LuminaNextDiT2DModel",
    sample_size=14,
    hidden_size=60,
    num_layers=2,
    num_attention_heads=5,
    num_kv_heads=1,
    multiple_of=8,
    ffn_dim_multiplier=0.25,
    cross_attention_dim=16,
)
def lumina_next_dit(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_mask": torch.arange(11)[None] < 8,
        "image_rotary_emb": torch.polar(torch.ones(8, 8, 6), draw(8, 8, 6)),  # the model takes what the image needs
        "cross_attention_kwargs": {},  # the model cannot do without
    }


@tiny(
    "NucleusMoEImageTransformer2DModel",
    in_channels=8,
    out_channels=2,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    num_key_value_heads=1,
    joint_attention_dim=16,
    axes_dims_rope=(4, 4, 4),
    dense_moe_strategy="leave_first_block_dense",
    num_experts=5,
    moe_intermediate_dim=16,
    capacity_factors=2.0,
)
def nucleus_moe_image(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 35, 8),
        "img_shapes": [(1, 5, 7)],
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_hidden_states_mask": torch.arange(11)[None] < 8,
        "timestep": torch.tensor([0.5]),
    }


@tiny(
    "OmniGenTransformer2DModel",
    in_channels=4,
    hidden_size=60,
    num_attention_heads=5,
    num_key_value_heads=1,
    intermediate_size=24,
    num_layers=2,
    pad_token_id=12,
    vocab_size=13,
    max_position_embeddings=128,
    original_max_position_embeddings=64,
    rope_scaling={"short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
    pos_embed_max_size=9,
    time_step_dim=16,
)
def omni_gen(draw: Draw) -> dict[str, Any]:
    index = torch.arange(61)  # 25 tokens of the prompt, the time, the image
    seen = (index[None] <= index[:, None]) | (index[:, None] > 25)
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "timestep": torch.tensor([0.5]),
        "input_ids": torch.where(index < 3, 12, index % 11)[None, :25],
        "input_img_latents": [draw(1, 4, 6, 10)],
        "input_image_sizes": {0: [[6, 21]]},  # where among the tokens
        "attention_mask": (seen & (index >= 3)).long()[None].index_fill(1, index[:3], 1),
        "position_ids": (index - 3).clamp(min=0)[None],
    }


@tiny(
    "PRXTransformer2DModel",
    in_channels=4,
    context_in_dim=16,
    hidden_size=60,
    mlp_ratio=0.5,
    num_heads=5,
    depth=2,
    axes_dim=[6, 6],
    bottleneck_size=12,
    resolution_embeds=True,
)
def prx(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 11, 16),
        "attention_mask": torch.arange(11)[None] < 8,
    }


@tiny(
    "PixArtTransformer2DModel",
    num_attention_heads=5,
    attention_head_dim=12,
    num_layers=2,
    cross_attention_dim=60,
    sample_size=14,
    use_additional_conditions=True,
    caption_channels=16,
)
def pix_art(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 10, 14),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": torch.tensor([[80.0, 112.0]]), "aspect_ratio": torch.tensor([[0.7]])},
        "encoder_attention_mask": torch.arange(11)[None] < 8,
    }


@tiny(
    "QwenImage21Transformer2DModel",
    in_channels=8,
    out_channels=8,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    context_in_dim=16,
    mlp_ratio=1,
    axes_dims_rope=(4, 4, 4),
)
def qwen_image_21(draw: Draw) -> dict[str, Any]:
    text, image = [False], [True]  # four tokens of an image take the place of one of text
    return {
        "hidden_states": draw(1, 40, 8),
        "encoder_hidden_states": draw(1, 10, 16),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 6), (1, 4, 7)]],  # what the text shows, and what is made
        "img_mask": torch.tensor([text * 4 + image * 3 + text * 3 + image * 7]),  # 47 tokens
        "encoder_hidden_states_mask": torch.arange(10)[None] >= 2,
    }


@tiny(
    "SanaTransformer2DModel",
    in_channels=4,
    out_channels=4,
    num_attention_heads=5,
    attention_head_dim=12,
    num_layers=3,  # what a control net adds comes after the second
    num_cross_attention_heads=5,
    cross_attention_head_dim=12,
    cross_attention_dim=60,
    caption_channels=16,
    mlp_ratio=0.5,
    sample_size=7,
    interpolation_scale=1,
    guidance_embeds=True,
    qk_norm="rms_norm_across_heads",
)
def sana(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 5, 7),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([4.5]),
        "encoder_attention_mask": torch.arange(11)[None] < 8,
        "controlnet_block_samples": (draw(1, 35, 60),),
    }


@tiny(
    "Transformer2DModel",
    num_attention_heads=5,
    attention_head_dim=12,
    in_channels=10,
    num_layers=2,
    norm_num_groups=5,
    cross_attention_dim=16,
)
def transformer_2d(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 10, 5, 7),
        "encoder_hidden_states": draw(1, 11, 16),
        "attention_mask": torch.arange(35)[None] < 31,
        "encoder_attention_mask": torch.arange(11)[None] < 8,
    }
