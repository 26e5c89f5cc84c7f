"""The embedded model: handwritten digits that move, from weights that ship with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.diffusion.request import Options, Request
from meshdiff.diffusion.sampling import SOLVERS, Solver, flow_times
from meshdiff.distributed.mesh import place
from meshdiff.distributed.placements import REPLICATED
from meshdiff.errors import InputError
from meshdiff.models.checkpoint import load_weights
from meshdiff.models.digits_prompts import Prompt, parse_prompt
from meshdiff.models.layers import parameter_dtype, rope_3d
from meshdiff.models.video_dit import VideoDiT, VideoDiTConfig
from meshdiff.models.wan import patchify, unpatchify

__all__ = ["WEIGHTS", "DigitsModel"]

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class DigitsModel:
    """Moving digits in pixel space: the latents are the frames themselves.

    Args:
        transformer: a `VideoDiT` whose vocabulary is that of `meshdiff.models.digits_prompts`.
    """

    DEFAULTS = Request(
        "a 7 moving left", frames=16, height=32, width=32, steps=20, guidance_scale=4.0, solver="ab2", shift=3.0
    )
    """A request with a value for every field."""
    SIZES: ClassVar = {"frames": (8, 24), "height": (32, 48), "width": (32, 48)}
    """Smallest and largest size at which digits stay legible."""
    MOST_TOKENS = 288
    """Most tokens of a clip in which digits stay legible, frames and canvas together."""

    time_unit = 1.0
    fps = 8

    def __init__(self, transformer: VideoDiT) -> None:
        self.transformer = transformer
        self.transformers = [transformer]
        self.config = transformer.config

    @classmethod
    def load(cls, weights: Path = WEIGHTS) -> DigitsModel:
        """The model with weights from a file.

        Raises:
            InputError: if the file is missing, broken, or of another model.
        """
        transformer = VideoDiT(VideoDiTConfig())
        load_weights(transformer, weights)
        return cls(transformer.eval().requires_grad_(False))

    def fill(self, expert: int, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """Move parameters, which `load` has read already, to the device."""
        for name in names:
            parameter = self.transformer.get_parameter(name)
            parameter.data = parameter.data.to(device, parameter_dtype(name, dtype))

    def expert(self, time: float) -> int:
        return 0

    def schedule(self, request: Request) -> tuple[list[float], Solver]:
        assert request.steps is not None
        assert request.shift is not None
        assert request.solver is not None
        return flow_times(request.steps, request.shift), SOLVERS[request.solver]()

    def prepare(self, request: Request) -> Request:
        """The request with nothing left open; raises `InputError` for a prompt or a size that the model cannot do."""
        request = self.check(request)
        for (name, (smallest, largest)), patch in zip(self.SIZES.items(), self.config.patch, strict=True):
            size = getattr(request, name)
            if size % patch or not smallest <= size <= largest:
                fits = ", ".join(str(n) for n in range(smallest, largest + 1) if n % patch == 0)
                raise InputError(f"--{name}", f"{size} given; this model makes {fits}")
        _, rows, columns = self.grid(request)
        frames = self.MOST_TOKENS // (rows * columns) * self.config.patch[0]
        given, height, width = request.size
        if given > frames:
            canvas = f"{height} x {width}"
            raise InputError("--frames", f"{given} given; on a canvas of {canvas} this model makes {frames} at most")
        return request

    def check(self, request: Request) -> Request:
        """The request with nothing left open; raises `InputError` for unknown words or solvers."""
        request = request.filled(self.DEFAULTS)
        request.options_of(Options)
        if request.solver not in SOLVERS:
            raise InputError("--solver", f"{request.solver!r} given; this model has {', '.join(SOLVERS)}")
        if parse_prompt(request.prompt) == Prompt():
            raise InputError("--prompt", f"{request.prompt!r} names neither a digit nor a direction nor a speed")
        parse_prompt(request.negative_prompt, "--negative-prompt")
        return request

    def grid(self, request: Request) -> tuple[int, int, int]:
        """Tokens of the clip along (frames, rows, columns)."""
        t, h, w = self.config.patch
        frames, height, width = request.size
        return frames // t, height // h, width // w

    def encode(self, prompts: Sequence[str], mesh: DeviceMesh) -> Tensor:
        """The numbers of each prompt's words, int64 `[len(prompts), TEXT_LENGTH]`."""
        words = torch.tensor([parse_prompt(prompt).words() for prompt in prompts], device=mesh.device_type)
        return place(words, mesh["cp"], [REPLICATED])

    def noise(self, request: Request) -> Tensor:
        """Initial tokens `[1, seq, patch_dim]` float32, drawn on the CPU so that they depend on the seed alone."""
        generator = torch.Generator().manual_seed(request.seed)
        shape = (1, self.config.channels, *request.size)
        return patchify(torch.randn(shape, generator=generator), self.config.patch)

    def rope(self, request: Request) -> tuple[Tensor, Tensor]:
        """Position tables, one row a token."""
        return rope_3d(self.grid(request), self.config.head_dim)

    def decode(self, tokens: Tensor, request: Request, mesh: DeviceMesh | None = None) -> Tensor:
        """Decode clean tokens `[1, seq, patch_dim]` to a clip `[frames, channels, height, width]` in [-1, 1]."""
        video = unpatchify(tokens.float(), self.grid(request), self.config.patch)
        return video[0].transpose(0, 1).clamp(-1, 1).contiguous()
