"""Models, each written as for one device, and the protocols that a pipeline needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.diffusion.request import Request
from meshdiff.diffusion.sampling import Solver
from meshdiff.models.digits import DigitsModel
from meshdiff.models.random_weights import RandomModel, RandomShape
from meshdiff.models.wan_model import WanModel, WanOptions

__all__ = ["DigitsModel", "RandomModel", "RandomShape", "Transformer", "VideoModel", "WanModel", "WanOptions"]


class Transformer(Protocol):
    """A network from tokens and time to velocity: a `torch.nn.Module` that has these attributes as well.

    `config.heads` is the number of its attention heads; `blocks` is a list of modules; `order` has the names of its
    modules in the order in which `encode_text` runs them, and in that of `forward(x, time, context, rope)`.
    """

    config: Any
    blocks: nn.ModuleList
    order: tuple[list[str], list[str]]

    def encode_text(self, text: Tensor) -> Tensor: ...


class VideoModel(Protocol):
    """A video diffusion model: tokens in, velocity out, and the ways in and out of tokens."""

    transformers: Sequence[nn.Module]
    """The experts, each a `Transformer`; most models have one."""
    time_unit: float
    """The time that the transformers take for time 1 of the flow."""
    fps: int
    """Frames a second, as it was trained."""
    DEFAULTS: Request
    """Values for the fields that a request leaves open."""

    def fill(self, expert: int, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """Give the parameters of those names of a transformer their values, on the device, for computing in `dtype`."""

    def prepare(self, request: Request) -> Request:
        """The request with nothing left open; raises `InputError` if the model cannot do it."""

    def expert(self, time: float) -> int:
        """The index of the transformer for that time, 1 being noise."""

    def grid(self, request: Request) -> tuple[int, int, int]:
        """Tokens along (frames, rows, columns)."""

    def encode(self, prompts: Sequence[str], mesh: DeviceMesh) -> Tensor:
        """Input of `Transformer.encode_text` for these prompts, `[len(prompts), ...]`, replicated on `mesh["cp"]`."""

    def schedule(self, request: Request) -> tuple[list[float], Solver]:
        """The times of a run, from noise to 0, and the solver that goes through them."""

    def noise(self, request: Request) -> Tensor:
        """The tokens to start from, `[1, seq, channels]`, float32 on the CPU, from the seed alone."""

    def rope(self, request: Request) -> tuple[Tensor, Tensor]:
        """Position tables, one row a token."""

    def decode(self, tokens: Tensor, request: Request, mesh: DeviceMesh) -> Tensor:
        """Decode clean tokens to a clip `[frames, channels, height, width]` in [-1, 1]; both are equal on all ranks."""
