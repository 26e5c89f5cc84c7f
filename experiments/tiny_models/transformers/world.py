"""Models of video and more of a world: its sound, what is done in it, and the camera it is seen from."""

from __future__ import annotations

from typing import Any

import torch

from experiments.tiny_models.transformers.registry import Draw, tiny
from experiments.tiny_models.transformers.video import HEADS, padded, rotation


@tiny(
    "LTX2VideoTransformer3DModel",
    **HEADS,
    in_channels=8,
    out_channels=8,
    cross_attention_dim=60,
    gated_attn=True,
    cross_attn_mod=True,
    audio_in_channels=6,
    audio_out_channels=6,
    audio_num_attention_heads=5,  # as of the video, because this rotation parts both by the number of heads
    audio_attention_head_dim=8,
    audio_cross_attention_dim=40,
    audio_gated_attn=True,
    audio_cross_attn_mod=True,
    num_layers=2,
    caption_channels=16,
    rope_type="split",
    perturbed_attn=True,
    use_keyframes_abs_pos_embedding=True,
)
def ltx2_video(draw: Draw) -> dict[str, Any]:
    seen = padded(105, *[105] * 35, *[70] * 35, *[105] * 35)  # the second frame does not see the third
    return {
        "hidden_states": draw(2, 105, 8),
        "audio_hidden_states": draw(2, 7, 6),
        "encoder_hidden_states": draw(2, 11, 16),
        "audio_encoder_hidden_states": draw(2, 11, 16),
        "timestep": (torch.arange(105) // 35 * 400).repeat(2, 1),
        "audio_timestep": torch.tensor([500, 300]),
        "sigma": torch.tensor([500, 300]),
        "encoder_attention_mask": padded(11, 8, 10),
        "audio_encoder_attention_mask": padded(11, 8, 10),
        "num_frames": 3,
        "height": 5,
        "width": 7,
        "audio_num_frames": 7,
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.tensor([0.0, 1.0]),
        "video_self_attention_mask": seen.repeat(2, 1, 1),
        "video_keyframes_mask": padded(105, 35, 35)[..., None],
    }


@tiny(
    "SanaWMLTX2RefinerTransformer3DModel",
    **HEADS,
    in_channels=8,
    out_channels=8,
    cross_attention_dim=60,
    gated_attn=True,
    audio_in_channels=6,
    audio_out_channels=6,
    audio_num_attention_heads=5,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=40,
    num_layers=2,
    caption_channels=16,
)
def sana_wm_refiner(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 105, 8),
        "encoder_hidden_states": draw(1, 11, 16),
        "timestep": torch.arange(105)[None] // 35 * 400,
        "video_rotary_emb": rotation(draw, 1, 105, 60),
        "encoder_attention_mask": padded(11, 8),
    }


@tiny(
    "SanaWMTransformer3DModel",
    in_channels=4,
    num_layers=3,
    hidden_size=80,
    num_attention_heads=5,
    softmax_every_n=2,  # between two of linear attention
    linear_head_dim=16,
    chunk_plucker_channels=12,
    chunk_plucker_post_attn_blocks=2,
    caption_channels=16,
    mlp_ratio=1.5,
)
def sana_wm(draw: Draw) -> dict[str, Any]:
    pose = torch.eye(4).repeat(1, 5, 1, 1)
    pose[..., :3, :3] = torch.linalg.qr(draw(1, 5, 3, 3))[0]
    pose[..., :3, 3] = draw(1, 5, 3)
    lens = torch.tensor([6.0, 6.0, 3.5, 2.5]).expand(1, 5, 4)  # focal lengths and center, in tokens
    return {
        "hidden_states": draw(1, 4, 5, 5, 7),
        "timestep": torch.tensor([[[0, 500, 500, 500, 500]]]),
        "encoder_hidden_states": draw(1, 11, 16),
        "encoder_attention_mask": padded(11, 8),
        "camera_conditions": torch.cat([pose.flatten(2), lens], -1),
        "chunk_plucker": draw(1, 12, 5, 5, 7),
        "frame_valid_mask": padded(5, 4)[:, None],
    }


@tiny(
    "Kandinsky6Transformer3DModel",
    in_visual_dim=4,
    out_visual_dim=4,
    in_text_dim=16,
    in_text_dim2=20,
    time_dim=24,
    model_dim=60,
    ff_dim=48,
    num_text_blocks=2,
    num_visual_blocks=2,
    axes_dims=(4, 4, 4),
    in_audio_dim=6,
    out_audio_dim=6,
    model_dim_a=84,
    time_dim_a=28,
    ff_dim_a=40,
    ca_rope=True,
    cross_gates=True,
    fix_modulation=True,
    visual_token_type_num_embeddings=2,
)
def kandinsky_6(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 3, 10, 14, 9),
        "encoder_hidden_states": draw(1, 11, 16),
        "pooled_projections": draw(1, 20),
        "timestep": torch.tensor([500]),
        "audio_hidden_states": draw(1, 7, 6),
        "visual_rope_pos": (torch.arange(3), torch.arange(5), torch.arange(7)),
        "encoder_attention_mask": padded(11, 8),
        "visual_token_type_ids": torch.tensor([[1, 0, 0]]),
    }


@tiny(
    "MiniMaxH3Transformer3DModel",
    num_attention_heads=5,
    attention_head_dim=16,
    hidden_size=48,
    num_layers=2,
    ffn_dim=24,
    in_channels=4,
    audio_in_channels=6,
    text_dim=16,
    freq_dim=16,
    time_embed_hidden_dim=24,
    time_embed_dim=20,
    rope_freq_dim=2,
)
def mini_max_h3(draw: Draw) -> dict[str, Any]:
    video, audio, text = torch.arange(7, 112), torch.arange(112, 119), torch.arange(7)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(7))
    line = torch.arange(7)[:, None].expand(7, 3)
    return {
        "hidden_states": draw(1, 105, 16),
        "audio_hidden_states": draw(1, 7, 6),
        "encoder_hidden_states": draw(1, 7, 16),
        "timestep": torch.tensor([0, 500]),
        "timestep_indices": (torch.arange(119) >= 42).long(),  # the first frame is given
        "token_tags": torch.tensor([2] * 7 + [0] * 105 + [1] * 7),
        "position_ids": torch.cat([line, places + 7, line + 7]),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


@tiny(
    "Cosmos3OmniTransformer",
    head_dim=6,
    hidden_size=40,
    intermediate_size=24,
    latent_channel=4,
    num_attention_heads=25,
    num_hidden_layers=2,
    num_key_value_heads=5,
    patch_latent_dim=16,
    action_dim=3,
    action_gen=True,
    num_embodiment_domains=4,
    sound_dim=6,
    sound_gen=True,
    vocab_size=32,
    rope_axes_dim=(1, 1, 1),
)
def cosmos_3_omni(draw: Draw) -> dict[str, Any]:
    places = torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(7)).T
    line = torch.arange(11).expand(3, 11)
    return {
        "input_ids": torch.arange(11) * 7 % 32,
        "text_indexes": torch.arange(11),
        "position_ids": torch.cat([line, places + 11, line[:, :7] + 11, line[:, :7] + 11], 1),
        "und_len": 11,
        "sequence_length": 130,
        "vision_tokens": [draw(1, 4, 3, 9, 13)],  # which it pads to 5 x 7 tokens a frame
        "vision_token_shapes": [(3, 5, 7)],
        "vision_sequence_indexes": torch.arange(11, 116),
        "vision_mse_loss_indexes": torch.arange(46, 116),  # the first frame is given
        "vision_timesteps": torch.full((70,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(1, 3)],
        "sound_tokens": [draw(6, 7)],
        "sound_token_shapes": [(7, 1, 1)],
        "sound_sequence_indexes": torch.arange(116, 123),
        "sound_mse_loss_indexes": torch.arange(116, 123),
        "sound_timesteps": torch.full((7,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(7)],
        "action_tokens": [draw(7, 3)],
        "action_token_shapes": [(7, 1, 1)],
        "action_sequence_indexes": torch.arange(123, 130),
        "action_mse_loss_indexes": torch.arange(124, 130),
        "action_timesteps": torch.full((6,), 500.0),
        "action_noisy_frame_indexes": [torch.arange(1, 7)],
        "action_domain_ids": [torch.tensor(2)],
    }
