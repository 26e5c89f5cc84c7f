"""Models, each written as for one device, and what a pipeline needs of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.models.digits import DigitsModel
from meshdiff.request import Request

__all__ = ["DigitsModel", "VideoModel"]


class VideoModel(Protocol):
    """A video diffusion model: tokens in, velocity out, and the ways in and out of tokens."""

    transformer: nn.Module
    """Called with (tokens, time, context, rope); has `blocks`, a list of modules."""

    def check(self, request: Request) -> None: ...

    def grid(self, request: Request) -> tuple[int, int, int]: ...

    def encode(self, prompts: Sequence[str], mesh: DeviceMesh) -> Tensor: ...

    def noise(self, request: Request) -> Tensor: ...

    def rope(self, request: Request) -> tuple[Tensor, Tensor]: ...

    def decode(self, tokens: Tensor, request: Request) -> Tensor: ...
