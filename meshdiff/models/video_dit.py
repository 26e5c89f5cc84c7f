"""A small video diffusion transformer in the style of Wan, written as for one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from meshdiff.models.layers import Block, Head, TimeEmbedding


@dataclass(frozen=True)
class VideoDiTConfig:
    """The shape of a `VideoDiT`."""

    channels: int = 1
    """Channels of a frame."""
    patch: tuple[int, int, int] = (2, 8, 8)
    """Frames, rows and columns that one token covers."""
    dim: int = 192
    """Width of the residual stream."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 8
    """Attention heads; `dim / heads` must be even."""
    ffn_dim: int = 720
    """Inner width of the feed-forward layers."""
    vocabulary: int = 24
    """Number of words the prompt may be made of."""

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


class VideoDiT(nn.Module):
    """Velocity of a flow from noise to video, given the time and a prompt.

    The network itself predicts the clean clip, which lies on a low-dimensional
    manifold and is easier to express than a velocity that carries the noise of
    a whole patch (Li & He, "Back to Basics: Let Denoising Generative Models
    Denoise", arXiv:2511.13720); `forward` converts it.
    """

    TIME_FLOOR = 0.05

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.patch_dim, dim)
        self.word_embedding = nn.Embedding(config.vocabulary, dim)
        self.text_mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = TimeEmbedding(dim)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.ffn_dim) for _ in range(config.depth))
        self.head = Head(dim, config.patch_dim)

    def encode_text(self, words: Tensor) -> Tensor:
        """What cross-attention reads of prompts, once a run.

        Args:
            words: their numbers, int64 `[batch, text]`.

        Returns:
            Context `[batch, depth, 2, text, heads, head_dim]`: keys and values for each block.
        """
        text = self.text_mlp(self.word_embedding(words))
        return torch.stack([block.cross_attention.project(text) for block in self.blocks], dim=1)

    def denoise(self, x: Tensor, time: Tensor, context: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The clean tokens that `x` is a noisy version of; arguments as for `forward`."""
        features = self.time_embedding(1000 * time)
        modulation = self.time_projection(features).unflatten(-1, (6, -1))
        hidden = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        for block, keys_values in zip(self.blocks, context.unbind(1), strict=True):
            hidden = block(hidden, modulation, keys_values, rope)
        return self.head(hidden, features)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity d(x)/d(time) of the flow `x = (1 - time) * clean + time * noise`.

        Args:
            x: noisy tokens `[batch, seq, patch_dim]`.
            time: `[batch]` in (0, 1], 1 is pure noise; or `[1]` for the whole batch.
            context: from `encode_text`.
            rope: the tables of `rope_3d`, each `[seq, 1, head_dim / 2]`.

        Returns:
            Velocity `[batch, seq, patch_dim]`, in the precision of `x`, which may be higher than the weights'.
        """
        clean = self.denoise(x, time, context, rope)
        return (x - clean) / time.clamp(min=self.TIME_FLOOR)[:, None, None]


def initialize(model: VideoDiT, generator: torch.Generator | None = None) -> None:
    """Draw fresh weights for training: small, with gates that start closed."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(
                parameter, std=0.02 if "embedding" in name else parameter.shape[1] ** -0.5, generator=generator
            )
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    for projection in (model.time_projection[1], model.head.linear):
        nn.init.zeros_(projection.weight)
