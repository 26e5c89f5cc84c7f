"""Models of sound, of embeddings, of molecules, and of what changes over the frames alone."""

from __future__ import annotations

from typing import Any

import torch

from experiments.tiny_models.transformers.registry import Draw, tiny


@tiny(
    "AceStepTransformer1DModel",
    hidden_size=60,
    intermediate_size=24,
    num_hidden_layers=2,  # one that looks at its neighbours, one that looks everywhere
    num_attention_heads=5,
    num_key_value_heads=1,
    head_dim=12,
    in_channels=14,
    audio_acoustic_hidden_dim=4,
    sliding_window=5,
    encoder_hidden_size=16,
)
def ace_step(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 69, 4),  # padded to 70, for 35 tokens
        "timestep": torch.tensor([0.5]),
        "timestep_r": torch.tensor([0.25]),
        "encoder_hidden_states": draw(1, 11, 16),
        "context_latents": draw(1, 69, 10),
    }


@tiny(
    "LongCatAudioDiTTransformer",
    dit_dim=60,
    dit_depth=2,
    dit_heads=5,
    dit_text_dim=16,
    latent_dim=4,
    ff_mult=0.5,
)
def long_cat_audio(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 35, 4),
        "encoder_hidden_states": draw(2, 11, 16),
        "encoder_attention_mask": torch.arange(11) < torch.tensor([[11], [8]]),
        "timestep": torch.tensor([0.5, 0.25]),
        "attention_mask": torch.arange(35) < torch.tensor([[31], [35]]),
        "latent_cond": draw(2, 35, 4),
    }


@tiny(
    "MiniMaxMusic3RVQDepthDecoder",
    hidden_size=60,
    num_layers=2,
    num_attention_heads=5,
    intermediate_size=24,
    audio_vocab_size=13,
    num_codebooks=7,
    max_position_embeddings=7,
)
def mini_max_music_3_depth(draw: Draw) -> dict[str, Any]:
    return {"inputs_embeds": draw(1, 7, 60)}


@tiny(
    "MiniMaxMusic3Transformer1DModel",
    in_channels=4,
    condition_dim=16,
    num_layers=2,
    num_attention_heads=5,
    attention_head_dim=12,
    ff_inner_dim=24,
    rotary_dim=6,
    fourier_embedding_dim=16,
)
def mini_max_music_3(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 34),  # 35 tokens with the time
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 34, 16),
    }


@tiny(
    "PriorTransformer",
    num_attention_heads=5,
    attention_head_dim=12,
    num_layers=2,
    embedding_dim=16,
    num_embeddings=13,
)
def prior(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16),  # 17 tokens: it, the text, its embedding, the time, and what becomes the output
        "timestep": torch.tensor([5]),
        "proj_embedding": draw(1, 16),
        "encoder_hidden_states": draw(1, 13, 16),
        "attention_mask": torch.arange(13)[None] < 8,
    }


@tiny(
    "RFD4ProteinaTransformer",
    nlayers=3,  # two of which the pairs hear of
    token_dim=60,
    nheads=5,
    dim_cond=16,
    pair_repr_dim=10,
    latent_dim=8,
    token_type_emb_dim=4,
    cath_emb_dim=4,
    t_emb_dim=8,
    seq_sep_dim=8,
    xt_pair_dist_dim=8,
    update_pair_repr_every_n=1,
    tri_mult_c=12,
    num_sequence_classes=13,
)
def rfd4_proteina(draw: Draw) -> dict[str, Any]:
    token = torch.arange(11)
    pair = (token[:, None] - token).abs()[None]
    atoms = torch.arange(11 * 37).view(1, 11, 37)
    names = ["hbond", "pistack", "pication", "saltbridge", "hydrophobic", "metal-coord", "hotspot"]
    frames = torch.full((1, 11, 6, 6), -1)
    frames[0, 4, 0] = torch.tensor([4, 4, 2, 3, 5, -1])  # at token 4 (its middle), with three neighbours
    owners = torch.full((1, 11, 6), -1)
    owners[0, [2, 3, 5], 0] = 4 * 6  # the first frame of token 4
    return {
        "bb_ca": draw(1, 11, 3),
        "local_latents": draw(1, 11, 8),
        "bb_ca_time": torch.tensor([0.5]),
        "local_latents_time": torch.tensor([0.25]),
        "padding_mask": token[None] < 9,
        "token_type": token[None] % 7,
        "atom37_mask": atoms % 5 > 0,
        "conditioning": {
            "is_in_context_conditioning": token[None] == 1,
            "supports_local_latent": token[None] != 2,
            "molecule_iid": token[None] // 4,
            "molecule_entity_id": token[None] // 6,
            "token_bond_path_length": pair,
            "bond_mask": pair == 1,
            "bond_order": pair % 5,
            "is_aromatic": pair % 3 == 1,
            "canonical_polymer_ordering": pair.clamp(max=1),
            "na_ss_state": token[None] % 2,
            "na_ss_state_mask": token[None] % 3 > 0,
            "na_ss_pair": pair % 2,
            "na_ss_pair_mask": pair % 3 > 0,
            "charge": atoms % 3 - 1,
            "element": atoms % 17,
            "chirality": draw(1, 11, 18),
            "chiral_frame_atoms": frames,
            "chiral_slot_owner": owners,
            "sequence-probability-ALA_1_residue": draw(1, 11).sigmoid(),
            "_prepared_coord_group_seq": (atoms % 4).float(),
            "condition_index-group_1_token": token[None] // 3,
            "condition_coordinate_1_atom": draw(1, 11, 37, 3),
            "condition_InternalCoordinate_1_atom": draw(1, 11, 37, 3),
            "condition_CoordinateGroup_1_atom": atoms % 4 - 1,
            "condition_rasa-binned_1_atom": atoms % 3,
            "condition_secondary-structure_1_residue": token[None] % 4,
            "condition_cath-label_1_residue": torch.stack([token % 4, token % 9, token], -1)[None],
            "condition_ChainCentroid_1_atom": draw(1, 11, 3),
            **{f"condition_{name}_1_atom": atoms % (3 + index) % 4 for index, name in enumerate(names)},
        },
        "recycle_depth": 2,
    }


@tiny(
    "StableAudio3DiTModel",
    io_channels=4,
    embed_dim=60,
    depth=2,
    num_heads=5,
    cond_token_dim=16,
    global_cond_dim=20,
    local_add_cond_dim=5,
    timestep_features_dim=16,
    ff_mult=0.5,
    num_memory_tokens=2,
)
def stable_audio_3(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, 35),  # 37 tokens with the memory
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 11, 16),
        "global_hidden_states": draw(1, 20),
        "encoder_attention_mask": torch.arange(11)[None] < 8,
        "local_add_cond": draw(1, 5, 35),
    }


@tiny(
    "StableAudioDiTModel",
    sample_size=34,
    in_channels=4,
    num_layers=2,
    attention_head_dim=12,
    num_attention_heads=5,
    num_key_value_attention_heads=1,
    out_channels=4,
    cross_attention_dim=12,
    time_proj_dim=16,
    global_states_input_dim=20,
    cross_attention_input_dim=16,
)
def stable_audio(draw: Draw) -> dict[str, Any]:
    angles = torch.arange(35)[:, None] / 10.0 ** torch.arange(3).repeat(2)  # of half of a head
    return {
        "hidden_states": draw(1, 4, 34),  # 35 tokens with the global one
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, 11, 16),
        "global_hidden_states": draw(1, 1, 20),
        "rotary_embedding": (angles.cos(), angles.sin()),
        "attention_mask": torch.arange(34)[None] < 31,
        "encoder_attention_mask": torch.arange(11)[None] < 8,
    }


@tiny(
    "T5FilmDecoder",
    input_dims=4,
    targets_length=35,
    d_model=60,
    num_layers=2,
    num_heads=5,
    d_kv=12,
    d_ff=24,
)
def t5_film(draw: Draw) -> dict[str, Any]:
    return {
        "encodings_and_masks": [
            (draw(1, 11, 60), (torch.arange(11)[None] < 8).float()),
            (draw(1, 6, 60), torch.ones(1, 6)),
        ],
        "decoder_input_tokens": draw(1, 35, 4),
        "decoder_noise_time": torch.tensor([0.5]),
    }


@tiny(
    "TransformerTemporalModel",
    num_attention_heads=5,
    attention_head_dim=12,
    in_channels=10,
    num_layers=2,
    norm_num_groups=5,
    positional_embeddings="sinusoidal",
    num_positional_embeddings=7,
)
def transformer_temporal(draw: Draw) -> dict[str, Any]:
    return {"hidden_states": draw(14, 10, 3, 5), "num_frames": 7}  # two videos, whose frames are the tokens
