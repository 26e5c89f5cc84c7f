"""Models, each written as for one device, and what a pipeline needs of one."""

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
    """Tokens and time to velocity; a `torch.nn.Module` with these as well.

    `config.heads` are its attention heads; `blocks` is a list of modules; `order` the names of its modules as
    `encode_text` needs them and as `forward(x, time, context, rope)` does.
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
    """What the transformers call the time 1."""
    fps: int
    """Frames a second, as it was trained."""
    DEFAULTS: Request
    """What a request that leaves something open gets."""

    def fill(self, expert: int, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """Give the parameters of those names of a transformer their values, on the device, for computing in `dtype`."""

    def prepare(self, request: Request) -> Request:
        """The request with nothing left open; raises `InputError` if the model cannot do it."""

    def expert(self, time: float) -> int:
        """Which transformer is for that time, 1 being noise."""

    def grid(self, request: Request) -> tuple[int, int, int]:
        """Tokens along (frames, rows, columns)."""

    def encode(self, prompts: Sequence[str], mesh: DeviceMesh) -> Tensor:
        """What `Transformer.encode_text` takes for these prompts, `[len(prompts), ...]`, whole on `mesh["cp"]`."""

    def schedule(self, request: Request) -> tuple[list[float], Solver]:
        """The times of a run, from noise to 0, and the solver that goes through them."""

    def noise(self, request: Request) -> Tensor:
        """The tokens to start from, `[1, seq, channels]`, float32 on the CPU, from the seed alone."""

    def rope(self, request: Request) -> tuple[Tensor, Tensor]:
        """Position tables, one row a token."""

    def decode(self, tokens: Tensor, request: Request, mesh: DeviceMesh) -> Tensor:
        """Clean tokens to a clip `[frames, channels, height, width]` in [-1, 1]; both the same on every rank."""
