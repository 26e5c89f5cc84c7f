"""Models of video whose text is looked up by cross-attention, where there is text at all."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor

from experiments.tiny_models.transformers.registry import Draw, tiny

__all__ = ["padded", "rotation"]

HEADS: dict[str, Any] = {"num_attention_heads": 5, "attention_head_dim": 12}
WAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 24,
    "num_layers": 2,
}
"""Sizes that all models derived from Wan have in common."""


def padded(length: int, *kept: int) -> Tensor:
    """A mask of tokens, one row for each number of those to keep: true, then false."""
    return torch.arange(length) < torch.tensor(kept)[:, None]


def rotation(draw: Draw, *shape: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines that turn neighbouring channels by the same random angle."""
    angles = draw(*shape[:-1], shape[-1] // 2).repeat_interleave(2, -1)
    return angles.cos(), angles.sin()


@tiny(
    "WanTransformer3DModel",
    **WAN,
    patch_size=(1, 2, 2),
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    rope_max_seq_len=32,
)
def wan(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 5, 10, 14),  # 5 x 5 x 7 tokens
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
    }


@tiny(
    "WanVACETransformer3DModel",
    **{**WAN, "num_layers": 3},
    vace_layers=[0, 2],
    vace_in_channels=6,
    rope_max_seq_len=32,
)
def wan_vace(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 5, 10, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
        "control_hidden_states": draw(1, 6, 5, 10, 14),
        "control_hidden_states_scale": torch.tensor([1.0, 0.7]),
    }


@tiny(
    "WanAnimateTransformer3DModel",
    **{**WAN, "in_channels": 12, "num_layers": 4},
    latent_channels=4,
    image_dim=16,
    added_kv_proj_dim=60,
    rope_max_seq_len=32,
    motion_encoder_channel_sizes={"4": 6, "8": 6},
    motion_encoder_size=8,
    motion_style_dim=12,
    motion_dim=5,
    motion_encoder_dim=12,
    face_encoder_hidden_dim=10,
    face_encoder_num_heads=4,  # which makes 5 tokens, one is padding
    inject_face_latents_blocks=2,
    motion_encoder_batch_size=7,
)
def wan_animate(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 12, 5, 10, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 512, 16),  # the only length with which it finds where the image ends
        "encoder_hidden_states_image": draw(1, 7, 16),
        "pose_hidden_states": draw(1, 4, 4, 10, 14),
        # Loud, because so many layers follow each other whose random weights are a tenth of what they should be.
        "face_pixel_values": draw(1, 3, 16, 8, 8) * 1e7,
    }


@tiny(
    "WanAnimate2Transformer3DModel",
    text_len=11,
    in_dim=9,
    dim=60,
    ffn_dim=24,
    freq_dim=16,
    text_dim=16,
    out_dim=4,
    num_heads=5,
    num_layers=2,
)
def wan_animate_2(draw: Draw) -> dict[str, Any]:
    # The other mode, "cached", compiles how it masks: too slow for here.
    return {
        "hidden_states": [draw(4, 5, 10, 14)],
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": [draw(7, 16)],
        "condition_latents": [draw(5, 5, 10, 14)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 175,
        "encoder_hidden_states_image": draw(1, 7, 1280),
        "offset_grid_sizes": torch.tensor([[5, 5, 7]]),
    }


@tiny("ChronoEditTransformer3DModel", **WAN, image_dim=16, added_kv_proj_dim=60, rope_max_seq_len=32)
def chrono_edit(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 5, 10, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 512, 16),  # the only length with which it finds where the image ends
        "encoder_hidden_states_image": draw(1, 7, 16),
    }


@tiny("SkyReelsV2Transformer3DModel", **WAN, rope_max_seq_len=32, inject_sample_info=True, num_frame_per_block=5)
def sky_reels_v2(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 25, 2, 10),  # as many frames as make five causal blocks
        "timestep": torch.arange(25)[None] // 5 * 200,
        "encoder_hidden_states": draw(1, 11, 16),
        "enable_diffusion_forcing": True,
        "fps": [1],
    }


@tiny("AnyFlowTransformer3DModel", **WAN, image_dim=20, rope_max_seq_len=32)
def any_flow(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 5, 4, 10, 14),
        "timestep": torch.tensor([[0, 500, 600, 700, 800]]),
        "r_timestep": torch.tensor([[0, 300, 400, 500, 600]]),
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_hidden_states_image": draw(1, 7, 20),
    }


@tiny("AnyFlowFARTransformer3DModel", **WAN, full_chunk_limit=2, image_dim=20, rope_max_seq_len=32)
def any_flow_far(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 6, 4, 10, 14),  # 2 x 3 tokens of the first chunk, which is too old, and 5 x 5 x 7
        "timestep": torch.tensor([[0, 500, 500, 700, 700, 700]]),
        "r_timestep": torch.tensor([[0, 300, 300, 500, 500, 500]]),
        "encoder_hidden_states": draw(1, 11, 16),
        "chunk_partition": [1, 2, 3],
        "encoder_hidden_states_image": draw(1, 7, 20),
    }


@tiny("HeliosTransformer3DModel", **WAN, rope_dim=(4, 4, 4))
def helios(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 5, 10, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
        "indices_hidden_states": torch.arange(12, 17)[None],
        "indices_latents_history_short": torch.arange(10, 12)[None],
        "indices_latents_history_mid": torch.arange(8, 10)[None],
        "indices_latents_history_long": torch.arange(8)[None],
        "latents_history_short": draw(1, 4, 2, 10, 14),  # 2 x 5 x 7 tokens
        "latents_history_mid": draw(1, 4, 2, 10, 14),  # 1 x 3 x 4
        "latents_history_long": draw(1, 4, 8, 10, 14),  # 2 x 2 x 2
    }


@tiny(
    "AllegroTransformer3DModel",
    **HEADS,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    cross_attention_dim=60,
    caption_channels=16,
)
def allegro(draw: Draw) -> dict[str, Any]:
    angles = [draw(size, 2).repeat(1, 2) for size in (3, 5, 7)]
    places = torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(7)).T[:, None]
    return {
        "hidden_states": draw(1, 4, 3, 10, 14),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500]),
        "attention_mask": padded(14, 12).repeat(1, 3, 10, 1),
        "encoder_attention_mask": padded(11, 8),
        "image_rotary_emb": ([(angle.cos(), angle.sin()) for angle in angles], places),
    }


@tiny(
    "LatteTransformer3DModel",
    **HEADS,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=60,
    attention_bias=True,
    sample_size=14,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=16,
    video_length=5,
)
def latte(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 5, 14, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, 11, 16),
        # It says that it makes this bias from a mask, and does not; each frame needs its own.
        "encoder_attention_mask": torch.where(padded(11, *[8] * 5), 0.0, -10000.0)[:, None],
    }


@tiny(
    "LTXVideoTransformer3DModel",
    **HEADS,
    in_channels=8,
    out_channels=8,
    cross_attention_dim=60,
    num_layers=2,
    caption_channels=16,
)
def ltx_video(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 105, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.arange(105)[None] // 35 * 400,  # of every token, as when the first frame is given
        "encoder_attention_mask": padded(11, 8),
        "num_frames": 3,
        "height": 5,
        "width": 7,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


@tiny(
    "SanaVideoTransformer3DModel",
    **HEADS,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_cross_attention_heads=5,
    cross_attention_head_dim=12,
    cross_attention_dim=60,
    caption_channels=16,
    mlp_ratio=1.5,
    guidance_embeds=True,
    rope_max_seq_len=32,
)
def sana_video(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 5, 10, 14),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500]),
        "guidance": torch.tensor([4.5]),
        "encoder_attention_mask": padded(11, 8),
        "controlnet_block_samples": (draw(1, 175, 60),),
    }


@tiny(
    "CosmosTransformer3DModel",
    **HEADS,
    in_channels=5,
    out_channels=4,
    num_layers=3,
    mlp_ratio=1.5,
    text_embed_dim=16,
    adaln_lora_dim=8,
    max_size=(8, 32, 32),
    concat_padding_mask=False,  # resizing it takes torchvision
    use_crossattn_projection=True,
    crossattn_proj_in_channels=24,
    encoder_hidden_states_channels=16,
    controlnet_block_every_n=2,
    img_context_dim_in=20,
    img_context_num_tokens=7,
    img_context_dim_out=60,
)
def cosmos(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 3, 10, 14),
        "timestep": torch.tensor([0.0, 0.5, 0.5]).view(1, 1, 3, 1, 1),
        "encoder_hidden_states": (draw(1, 11, 24), draw(1, 7, 20)),  # with an image it takes no mask of the text
        "block_controlnet_hidden_states": [draw(1, 105, 60), draw(1, 105, 60)],
        "fps": 16,
        "condition_mask": (torch.arange(3) < 1).float().view(1, 1, 3, 1, 1).repeat(1, 1, 1, 10, 14),
    }


@tiny(
    "Kandinsky5Transformer3DModel",
    in_text_dim=16,
    in_text_dim2=20,
    time_dim=24,
    model_dim=60,
    ff_dim=48,
    num_text_blocks=2,
    num_visual_blocks=2,
    axes_dims=(4, 4, 4),
    visual_cond=True,
)
def kandinsky_5(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 3, 10, 14, 9),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.tensor([500]),
        "pooled_projections": draw(1, 20),
        "visual_rope_pos": (torch.arange(3), torch.arange(5), torch.arange(7)),
        "text_rope_pos": torch.arange(11),
        "scale_factor": (1.0, 2.0, 2.0),
    }


@tiny(
    "Kandinsky6SRTransformer3DModel",
    in_visual_dim=4,
    out_visual_dim=8,
    time_dim=24,
    model_dim=80,
    ff_dim=48,
    num_visual_blocks=2,
    axes_dims=(4, 6, 6),
    nabla_window=(3, 1, 1),
)
def kandinsky_6_sr(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 5, 8, 8, 9),  # squares of 8 x 8 tokens are what it can do, here 5
        "timestep": torch.tensor([500]),
    }
