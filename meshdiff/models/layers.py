"""The layers that video diffusion transformers in the style of Wan are made of.

Everything here is written as for one device. Tensors may be plain or DTensors
whose token dim is sharded: no line below depends on which.

Reference: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative
Models", 2025, arXiv:2503.20314.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from meshdiff.attention import MeshAttention

FLOAT32 = ("time_embedding", "time_projection", "modulation", "norm_cross")
"""Parts of the names of parameters that stay float32 in a model of lower precision, as in Wan: they scale and gate
the other activations, and there are few of them."""


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parameter of that name in a model that computes in `dtype`."""
    return torch.float32 if any(part in name for part in FLOAT32) else dtype


def rope_3d(grid: tuple[int, int, int], head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Rotary position tables for tokens in frame-major order (frame, row, column).

    Each head's channel pairs are divided between the three axes as Wan divides
    them: rows and columns take a third of the pairs each, rounded down, and
    frames take the rest. Su et al., "RoFormer", arXiv:2104.09864.

    Args:
        grid: the number of latent (frames, rows, columns).
        head_dim: channels of one head; even.
        theta: base of the geometric progression of frequencies.

    Returns:
        Cosines and sines, each float32 `[seq, 1, head_dim / 2]`.
    """
    space = 2 * (head_dim // 6)
    dims = (head_dim - 2 * space, space, space)
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    angles = torch.cat(
        [
            torch.outer(positions[:, axis], theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim))
            for axis, dim in enumerate(dims)
        ],
        dim=1,
    ).unsqueeze(1)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channel pairs of `x` `[batch, seq, heads, head_dim]` by the tables of `rope_3d`."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).type_as(x)


class TimeEmbedding(nn.Module):
    """Diffusion time `[batch]` to features `[batch, dim]`, through sinusoids and a small MLP."""

    frequencies: Tensor

    def __init__(self, dim: int, frequency_dim: int = 256) -> None:
        super().__init__()
        half = frequency_dim // 2
        # On the CPU even where parameters are on the meta device: nothing will fill it in.
        steps = torch.arange(half, dtype=torch.float64, device="cpu")
        frequencies = torch.exp(-math.log(10_000) * steps / half)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep.float().unsqueeze(-1) * self.frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))


class SelfAttention(nn.Module):
    """Full attention over all tokens of the clip, with RMS-normed, rotated queries and keys."""

    def __init__(self, dim: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm_query = nn.RMSNorm(dim, eps=eps)
        self.norm_key = nn.RMSNorm(dim, eps=eps)
        self.attention = MeshAttention()
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key = self.norm_query(query), self.norm_key(key)
        # [batch, seq, dim] -> [batch, seq, heads, head_dim]
        query, key, value = (t.unflatten(-1, (self.heads, -1)) for t in (query, key, value))
        attended = self.attention(apply_rope(query, rope), apply_rope(key, rope), value)
        return self.out(attended.flatten(-2))


class CrossAttention(nn.Module):
    """Attention from the clip's tokens to the prompt's; keys and values are replicated."""

    def __init__(self, dim: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.norm_query = nn.RMSNorm(dim, eps=eps)
        self.norm_key = nn.RMSNorm(dim, eps=eps)
        self.attention = MeshAttention()
        self.out = nn.Linear(dim, dim)

    def project(self, context: Tensor) -> Tensor:
        """Keys and values of encoded prompts `[batch, text, dim]`, as `[batch, 2, text, heads, head_dim]`.

        They do not change while a clip is made: once a run is enough.
        """
        key, value = self.key_value(context).chunk(2, dim=-1)
        return torch.stack([self.norm_key(key), value], dim=1).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """Attend from `x` `[batch, seq, dim]` to `keys_values` as `project` returns them."""
        query = self.norm_query(self.query(x)).unflatten(-1, (self.heads, -1))
        key, value = keys_values.unbind(1)
        return self.out(self.attention(query, key, value).flatten(-2))


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`norm(x) * (1 + scale) + shift`, in the precision of shift and scale, returned in that of `x`."""
    return torch.addcmul(shift, norm(x.float()), 1 + scale).type_as(x)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; time enters as shifts, scales and gates.

    Peebles & Xie, "Scalable Diffusion Models with Transformers" (adaLN),
    arXiv:2212.09748; as in Wan, all blocks share one time projection and each
    adds an offset of its own.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int, eps: float = 1e-6, cross_norm: bool = True) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norm_attention = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads, eps)
        self.norm_cross = nn.LayerNorm(dim, eps=eps) if cross_norm else nn.Identity()
        self.cross_attention = CrossAttention(dim, heads, eps)
        self.norm_ffn = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor, time: Tensor, keys_values: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Take `x` `[batch, seq, dim]`, `time` `[batch or 1, 6, dim]`, `keys_values` of `cross_attention.project`."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time).chunk(6, dim=1)
        x = (x + gate * self.attention(modulate(self.norm_attention, x, shift, scale), rope)).type_as(x)
        x = x + self.cross_attention(self.norm_cross(x.float()).type_as(x), keys_values)
        return (x + ffn_gate * self.ffn(modulate(self.norm_ffn, x, ffn_shift, ffn_scale))).type_as(x)


class Head(nn.Module):
    """Tokens `[batch, seq, dim]` to patches `[batch, seq, patch_dim]`, modulated by time."""

    def __init__(self, dim: int, patch_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.linear = nn.Linear(dim, patch_dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Take `x` `[batch, seq, dim]`, `time` `[batch or 1, dim]`."""
        shift, scale = (self.modulation + time.unsqueeze(1)).chunk(2, dim=1)
        return self.linear(modulate(self.norm, x, shift, scale))
