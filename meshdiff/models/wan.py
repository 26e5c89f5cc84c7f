"""Wan's video transformer, of any size, written as for one device.

Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models", 2025,
arXiv:2503.20314. Its weights come from `wan_checkpoint`; the embedded model
is the same network with another text embedding and another output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from meshdiff.models.layers import Block, Head, TimeEmbedding

__all__ = ["WanConfig", "WanTransformer", "patchify", "unpatchify"]


@dataclass(frozen=True)
class WanConfig:
    """The shape of a `WanTransformer`; the defaults are those of Wan2.1-T2V-1.3B."""

    channels: int = 16
    """Channels of a latent frame, in and out."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns that one token covers."""
    dim: int = 1536
    """Width of the residual stream."""
    depth: int = 30
    """Number of blocks."""
    heads: int = 12
    """Attention heads; `dim / heads` must be even."""
    ffn_dim: int = 8960
    """Inner width of the feed-forward layers."""
    text_dim: int = 4096
    """Width of encoded text."""
    frequency_dim: int = 256
    """Sinusoids of the diffusion time."""
    cross_norm: bool = True
    """True if cross-attention has a norm before it."""
    eps: float = 1e-6
    """Epsilon of all norms."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def patch_dim(self) -> int:
        frames, rows, columns = self.patch
        return frames * rows * columns * self.channels


def patchify(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Video `[batch, channels, frames, height, width]` to tokens `[batch, seq, patch_dim]`, frame-major."""
    t, h, w = patch
    return rearrange(video, "b c (f t) (y h) (x w) -> b (f y x) (t h w c)", t=t, h=h, w=w)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify` for a latent `grid` of (frames, rows, columns)."""
    (f, y, x), (t, h, w) = grid, patch
    return rearrange(tokens, "b (f y x) (t h w c) -> b c (f t) (y h) (x w)", f=f, y=y, x=x, t=t, h=h, w=w)


class WanTransformer(nn.Module):
    """Velocity of a flow from noise to video, given the time and encoded text."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.patch_dim, dim)
        self.text_mlp = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = TimeEmbedding(dim, config.frequency_dim)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.ffn_dim, config.eps, config.cross_norm) for _ in range(config.depth)
        )
        self.head = Head(dim, config.patch_dim, config.eps)

    @property
    def order(self) -> tuple[list[str], list[str]]:
        """Names of the modules that hold weights, in the order of `encode_text` and in that of `forward`."""
        blocks = [f"blocks.{i}" for i in range(self.config.depth)]
        of_text = [f"{block}.cross_attention.{part}" for block in blocks for part in ("key_value", "norm_key")]
        return ["text_mlp", *of_text], ["time_embedding", "time_projection", "patch_embedding", *blocks, "head"]

    def encode_text(self, text: Tensor) -> Tensor:
        """Keys and values of prompts for cross-attention, computed once a run.

        Args:
            text: encoded prompts `[batch, text, text_dim]`.

        Returns:
            Context `[batch, depth, 2, text, heads, head_dim]`: keys and values for each block.
        """
        text = self.text_mlp(text.to(self.patch_embedding.weight.dtype))
        return torch.stack([block.cross_attention.project(text) for block in self.blocks], dim=1)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity d(x)/d(time) of the flow `x = (1 - time) * clean + time * noise`.

        Args:
            x: noisy tokens `[batch, seq, patch_dim]`.
            time: `[batch]` in [0, 1000], 1000 is pure noise; or `[1]` for the whole batch.
            context: from `encode_text`.
            rope: the tables of `rope_3d`, each `[seq, 1, head_dim / 2]`.

        Returns:
            Velocity `[batch, seq, patch_dim]`, in the precision of `x`, which may be higher than the weights'.
        """
        features = self.time_embedding(time)
        modulation = self.time_projection(features).unflatten(-1, (6, -1))
        hidden = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        for block, keys_values in zip(self.blocks, context.unbind(1), strict=True):
            hidden = block(hidden, modulation, keys_values, rope)
        return self.head(hidden, features).type_as(x)
