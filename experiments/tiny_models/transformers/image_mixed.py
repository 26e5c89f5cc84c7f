"""Models of images in which text has blocks of its own before, or beside, those that it shares with the image."""

from __future__ import annotations

from typing import Any

import torch

from experiments.tiny_models.transformers.registry import Draw, tiny


@tiny(
    "ZImageTransformer2DModel",
    in_channels=4,
    dim=60,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=5,
    n_kv_heads=5,
    cap_feat_dim=16,
    axes_dims=[4, 4, 4],
    axes_lens=[64, 16, 16],
)
def z_image(draw: Draw) -> dict[str, Any]:
    return {
        "x": [draw(4, 1, 10, 14), draw(4, 1, 6, 10)],  # 35 and 15 tokens, padded to multiples of 32
        "t": torch.tensor([0.5, 0.25]),
        "cap_feats": [draw(11, 16), draw(7, 16)],
        "controlnet_block_samples": {0: draw(2, 96, 60)},
    }


@tiny(
    "SD3Transformer2DModel",
    sample_size=14,
    in_channels=4,
    num_layers=3,
    attention_head_dim=12,
    num_attention_heads=5,
    joint_attention_dim=16,
    caption_projection_dim=60,
    pooled_projection_dim=20,
    out_channels=4,
    pos_embed_max_size=9,
    dual_attention_layers=(0,),  # then a block with one attention, then one without an output for the text
    qk_norm="rms_norm",
)
def sd3(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 4, 10, 14),
        "encoder_hidden_states": draw(2, 11, 16),
        "pooled_projections": draw(2, 20),
        "timestep": torch.tensor([500, 250]),
        "block_controlnet_hidden_states": [draw(2, 35, 60)],
    }
