"""The embedded model's transformer: a small one of Wan's architecture, for words and for frames in pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshdiff.models.wan import WanConfig, WanTransformer

__all__ = ["VideoDiT", "VideoDiTConfig", "initialize"]


@dataclass(frozen=True)
class VideoDiTConfig(WanConfig):
    """The shape of a `VideoDiT`."""

    channels: int = 1
    patch: tuple[int, int, int] = (2, 8, 8)
    dim: int = 192
    depth: int = 6
    heads: int = 8
    ffn_dim: int = 720
    vocabulary: int = 24
    """Number of words the prompt may be made of."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_dim", self.dim)  # words are embedded here, at the model's own width


class VideoDiT(WanTransformer):
    """Velocity of a flow from noise to video, given the time and the words of a prompt.

    The network itself predicts the clean clip, which lies on a low-dimensional
    manifold and is easier to express than a velocity that carries the noise of
    a whole patch (Li & He, "Back to Basics: Let Denoising Generative Models
    Denoise", arXiv:2511.13720); `forward` converts it.
    """

    TIME_FLOOR = 0.05

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__(config)
        self.word_embedding = nn.Embedding(config.vocabulary, config.dim)

    def encode_text(self, text: Tensor) -> Tensor:
        """Keys and values for cross-attention, once a run; `text` are numbers of words, int64 `[batch, text]`."""
        return super().encode_text(self.word_embedding(text))

    @property
    def order(self) -> tuple[list[str], list[str]]:
        of_text, of_tokens = super().order
        return ["word_embedding", *of_text], of_tokens

    def denoise(self, x: Tensor, time: Tensor, context: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The clean tokens that `x` is a noisy version of; arguments as for `forward`."""
        return super().forward(x, 1000 * time, context, rope)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Velocity as from `WanTransformer.forward`, except that `time` is in (0, 1]."""
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
