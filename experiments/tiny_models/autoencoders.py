"""Tiny autoencoders of diffusers with random weights, of every kind that its pipelines decode with.

The names are diffusers' classes; where one class has two forms, the second has a further word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from meshdiff.distributed.simulation import outside

__all__ = ["AUTOENCODERS", "TinyAutoencoder"]


@dataclass(frozen=True)
class TinyAutoencoder:
    """An autoencoder, and tensors for it.

    Attributes:
        kind: the class in diffusers.
        latents: `[batch, channels, (frames,) height, width]` of what it decodes.
        pixels: the same of what it encodes.
        config: of the class.
        options: further arguments of `decode`.
        in_tiles: it decodes and encodes in tiles only, so that its decoder and encoder are called instead.
    """

    kind: str
    latents: tuple[int, ...]
    pixels: tuple[int, ...]
    config: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    in_tiles: bool = False

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = getattr(diffusers, self.kind)(**self.config).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():  # those that start as zeros would hide what they weigh
                    if not parameter.count_nonzero():
                        parameter.normal_(std=0.1)
                    elif "norm" in name:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def decode(self, model: Any) -> Tensor:
        with torch.no_grad():
            if self.in_tiles:
                return model.decoder(_drawn(self.latents))  # type: ignore[no-any-return]  # of a class by name
            return model.decode(_drawn(self.latents), **self.options, return_dict=False)[0]  # type: ignore[no-any-return]  # of a class by name

    def encode(self, model: Any) -> Tensor:
        """The latents, or the mean of their distribution."""
        with torch.no_grad():
            if self.in_tiles:
                return model.encoder(_drawn(self.pixels))  # type: ignore[no-any-return]  # of a class by name
            (encoded, *_) = model.encode(_drawn(self.pixels), return_dict=False)
        return encoded.mode() if hasattr(encoded, "mode") and not isinstance(encoded, Tensor) else encoded


def _drawn(shape: tuple[int, ...]) -> Tensor:
    with outside():  # random numbers that are drawn in a simulation differ by rank
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _blocks(kind: str, number: int) -> tuple[str, ...]:
    return (kind,) * number


_IMAGES: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": _blocks("DownEncoderBlock2D", 2),
    "up_block_types": _blocks("UpDecoderBlock2D", 2),
    "norm_num_groups": 4,
}
_WAN: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
}
_LTX: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "patch_size": 2,
    "patch_size_t": 1,
}
_HUNYUAN: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}

AUTOENCODERS: dict[str, TinyAutoencoder] = {
    "AutoencoderKL": TinyAutoencoder("AutoencoderKL", (1, 4, 7, 6), (1, 3, 22, 12), {**_IMAGES, "latent_channels": 4}),
    "AutoencoderKLFlux2": TinyAutoencoder(
        "AutoencoderKLFlux2", (1, 4, 7, 6), (1, 3, 22, 12), {**_IMAGES, "latent_channels": 4}
    ),
    "AutoencoderTiny": TinyAutoencoder(
        "AutoencoderTiny",
        (1, 4, 7, 6),
        (1, 3, 40, 32),
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
    ),
    "VQModel": TinyAutoencoder(
        "VQModel", (1, 3, 7, 6), (1, 3, 22, 12), {**_IMAGES, "latent_channels": 3}, {"force_not_quantize": True}
    ),
    "VQModel spatial": TinyAutoencoder(
        "VQModel",
        (1, 3, 7, 6),
        (1, 3, 22, 12),
        {
            **_IMAGES,
            "latent_channels": 3,
            "norm_type": "spatial",
            "block_out_channels": (32, 32),
            "norm_num_groups": 32,
        },
        {"force_not_quantize": True},
    ),
    "AutoencoderKLWan": TinyAutoencoder("AutoencoderKLWan", (1, 16, 3, 7, 6), (1, 3, 5, 28, 16), _WAN),
    "AutoencoderKLWan 2.2": TinyAutoencoder(
        "AutoencoderKLWan",
        (1, 16, 3, 7, 6),
        (1, 3, 5, 56, 32),
        {
            **_WAN,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "decoder_base_dim": 4,
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 2,
        },
    ),
    "AutoencoderKLQwenImage": TinyAutoencoder("AutoencoderKLQwenImage", (1, 16, 1, 7, 6), (1, 3, 1, 28, 16), _WAN),
    "AutoencoderKLHunyuanVideo": TinyAutoencoder(
        "AutoencoderKLHunyuanVideo",
        (1, 4, 3, 7, 6),
        (1, 3, 5, 28, 16),
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": _blocks("HunyuanVideoDownBlock3D", 3),
            "up_block_types": _blocks("HunyuanVideoUpBlock3D", 3),
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
    ),
    "AutoencoderKLHunyuanVideo15": TinyAutoencoder(
        "AutoencoderKLHunyuanVideo15", (1, 8, 2, 7, 6), (1, 3, 3, 28, 16), _HUNYUAN
    ),
    "AutoencoderKLHunyuanImage": TinyAutoencoder(
        "AutoencoderKLHunyuanImage",
        (1, 8, 7, 6),
        (1, 3, 28, 16),
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 8,
            "block_out_channels": (32, 32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "sample_size": 64,
        },
    ),
    "AutoencoderKLHunyuanImageRefiner": TinyAutoencoder(
        "AutoencoderKLHunyuanImageRefiner", (1, 8, 2, 7, 6), (1, 3, 3, 28, 16), _HUNYUAN
    ),
    "AutoencoderKLLTXVideo": TinyAutoencoder(
        "AutoencoderKLLTXVideo",
        (1, 8, 2, 7, 6),
        (1, 3, 5, 56, 32),
        {
            **_LTX,
            "decoder_block_out_channels": (8, 8, 8, 8),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_causal": False,
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "upsample_factor": (1, 1, 1, 1),
            "decoder_inject_noise": (False, False, False, False, False),
            "upsample_residual": (False,) * 4,
        },
    ),
    "AutoencoderKLLTX2Video": TinyAutoencoder(
        "AutoencoderKLLTX2Video",
        (1, 8, 2, 7, 6),
        (1, 3, 9, 112, 64),
        {
            **_LTX,
            "decoder_block_out_channels": (16, 32, 64),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, True, True),
            "decoder_causal": False,
            "decoder_spatio_temporal_scaling": (True, True, True),
            "upsample_factor": (2, 2, 2),
            "decoder_inject_noise": (False, False, False, False),
            "upsample_residual": (True, True, True),
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "encoder_causal": True,
            "decoder_spatial_padding_mode": "reflect",
            "encoder_spatial_padding_mode": "zeros",
        },
    ),
    "AutoencoderKLCogVideoX": TinyAutoencoder(
        "AutoencoderKLCogVideoX",
        (1, 4, 3, 7, 6),
        (1, 3, 5, 28, 16),
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "down_block_types": _blocks("CogVideoXDownBlock3D", 3),
            "up_block_types": _blocks("CogVideoXUpBlock3D", 3),
            "temporal_compression_ratio": 4,
        },
    ),
    "AutoencoderKLMochi": TinyAutoencoder(
        "AutoencoderKLMochi",
        (1, 4, 2, 7, 6),
        (1, 3, 7, 28, 16),
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_block_out_channels": (32, 32, 32, 32),
        },
    ),
    "AutoencoderKLAllegro": TinyAutoencoder(
        "AutoencoderKLAllegro",
        (1, 4, 2, 7, 6),
        (1, 3, 8, 28, 16),
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": _blocks("AllegroDownBlock3D", 3),
            "up_block_types": _blocks("AllegroUpBlock3D", 3),
            "temporal_downsample_blocks": (True, True, False),
            "temporal_upsample_blocks": (False, True, True),
        },
        in_tiles=True,
    ),
    "AutoencoderDC": TinyAutoencoder(
        "AutoencoderDC",
        (1, 4, 7, 6),
        (1, 3, 28, 16),
        {
            "latent_channels": 4,
            "attention_head_dim": 2,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
    ),
    "AutoencoderDC shuffle": TinyAutoencoder(
        "AutoencoderDC",
        (1, 4, 7, 6),
        (1, 3, 28, 16),
        {
            "latent_channels": 4,
            "attention_head_dim": 2,
            "encoder_block_types": ("ResBlock", "ResBlock"),
            "decoder_block_types": ("ResBlock", "ResBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
        },
    ),
    "AutoencoderKLCosmos": TinyAutoencoder(
        "AutoencoderKLCosmos",
        (1, 4, 2, 7, 6),
        (1, 3, 5, 56, 32),
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8),
            "decode_block_out_channels": (8, 8, 8),
            "attention_resolutions": (8,),
            "resolution": 32,
            "num_layers": 1,
            "patch_size": 2,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
    ),
    "AutoencoderKLTemporalDecoder": TinyAutoencoder(
        "AutoencoderKLTemporalDecoder",
        (3, 4, 7, 6),
        (1, 3, 22, 12),
        {
            "latent_channels": 4,
            "block_out_channels": (32, 32),
            "down_block_types": _blocks("DownEncoderBlock2D", 2),
            "layers_per_block": 1,
        },
        {"num_frames": 3},
    ),
    "AutoencoderKLMagvit": TinyAutoencoder(
        "AutoencoderKLMagvit",
        (1, 4, 2, 7, 6),
        (1, 3, 5, 28, 16),
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"),
            "up_block_types": ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"),
        },
    ),
    "AutoencoderKLKVAE": TinyAutoencoder(
        "AutoencoderKLKVAE",
        (1, 4, 7, 6),
        (1, 3, 22, 12),
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)},
    ),
    "AutoencoderKLKVAEVideo": TinyAutoencoder(
        "AutoencoderKLKVAEVideo",
        (1, 4, 2, 7, 6),
        (1, 3, 3, 28, 16),
        {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2},
    ),
    "AutoencoderOobleck": TinyAutoencoder(
        "AutoencoderOobleck",
        (1, 4, 13),
        (1, 2, 52),
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 2],
            "channel_multiples": [1, 2],
            "decoder_channels": 8,
            "decoder_input_channels": 4,
            "audio_channels": 2,
        },
    ),
}
