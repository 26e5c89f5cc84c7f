"""Wan 2.1 and 2.2 text-to-video, from a checkpoint folder to frames.

The transformer is ours; the text encoder and the VAE, which run once a clip,
are those of transformers and diffusers (`pip install "meshdiff[wan]"`).
"""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.diffusion.request import Options, Request
from meshdiff.diffusion.sampling import SOLVERS, Solver, flow_times
from meshdiff.distributed.consensus import agreed, is_first_rank
from meshdiff.distributed.mesh import from_first_rank, on_mesh
from meshdiff.distributed.placements import REPLICATED
from meshdiff.distributed.simulation import outside
from meshdiff.distributed.weight_streaming import Storage, stream
from meshdiff.errors import InputError
from meshdiff.models.checkpoint import fill
from meshdiff.models.layers import parameter_dtype, rope_3d
from meshdiff.models.vae_tiling import check_tile, decode
from meshdiff.models.wan import WanTransformer, patchify, unpatchify
from meshdiff.models.wan_checkpoint import WanCheckpoint, open_checkpoint

__all__ = ["WanModel", "WanOptions"]

TEXT_LENGTH = 512
"""Number of tokens of a prompt that the transformer takes; shorter prompts are padded with zeros."""

SMALL = 480 * 832
"""Largest number of pixels of a frame for which Wan's shift is the smaller one."""


@dataclass(frozen=True)
class WanOptions(Options):
    """Options of requests for Wan."""

    guidance_scale_2: float | None = None
    """Wan2.2: the scale for the second expert, which has the steps of little noise; by default the first's."""

    @property
    def more_scales(self) -> tuple[float, ...]:
        return () if self.guidance_scale_2 is None else (self.guidance_scale_2,)


class WanModel:
    """Wan text-to-video of any size, one expert or two.

    Args:
        checkpoint: the result of `open_checkpoint`.
        tile: the VAE decodes tiles of so many pixels a side, a quarter of which
            overlaps, divided between the ranks; 0 decodes the clip in one piece, on each rank.
        offload_text: the text encoder is kept in host memory and copied to the
            device a layer at a time.
        tiles_on_host: decoded tiles are put together in host memory.
    """

    DEFAULTS = Request(
        "A cat walking on grass.",
        frames=81,
        height=480,
        width=832,
        steps=50,
        guidance_scale=5.0,
        solver="unipc",
        options=WanOptions(),
    )
    """diffusers' defaults for Wan2.1, with a value for every field but the time shift, which depends on the size."""
    time_unit = 1000.0
    fps = 16

    def __init__(
        self, checkpoint: WanCheckpoint, tile: int = 256, offload_text: bool = False, tiles_on_host: bool = False
    ) -> None:
        self.checkpoint, self.tile = checkpoint, tile
        self.offload_text, self.tiles_on_host = offload_text, tiles_on_host
        self.config = checkpoint.experts[0].config
        with torch.device("meta"):
            self.transformers = [
                WanTransformer(expert.config).eval().requires_grad_(False) for expert in checkpoint.experts
            ]
        self.dtype = torch.float32

    @classmethod
    def open(cls, checkpoint: str, components: str | None = None, **options: Any) -> WanModel:
        """The model of a folder or hub id, see `open_checkpoint`; weights are read later, by a `Pipeline`."""
        return cls(open_checkpoint(checkpoint, components), **options)

    def fill(self, expert: int, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        source = self.checkpoint.experts[expert]
        fill(
            self.transformers[expert],
            names,
            source.weights,
            source.sources,
            device,
            partial(parameter_dtype, dtype=dtype),
        )
        self.dtype = dtype

    def expert(self, time: float) -> int:
        return 0 if time >= self.checkpoint.boundary else len(self.transformers) - 1

    def prepare(self, request: Request) -> Request:
        options = request.options_of(WanOptions)
        request = replace(request.filled(self.DEFAULTS), options=options)
        if len(self.transformers) == 1 and options.guidance_scale_2 is not None:
            raise InputError("--guidance-scale-2", "this checkpoint has one transformer; Wan2.2's have two")
        # The first latent frame is one frame, each other covers as many as the stride says.
        offsets = (self._units[0] - self.checkpoint.strides[0] + 1, 0, 0)
        for name, unit, offset in zip(("frames", "height", "width"), self._units, offsets, strict=True):
            size = getattr(request, name)
            if (size - offset) % unit:
                below = (size - offset) // unit * unit + offset
                near = " or ".join(str(n) for n in (below, below + unit) if n > 0)
                rule = f"{unit} n + {offset}" if offset else f"multiples of {unit}"
                raise InputError(f"--{name}", f"{size} given; this model makes {rule}, for instance {near}")
        check_tile(self.checkpoint.strides[1], self.tile, self._overlap)
        if request.solver == "unipc":
            UniPC(self.checkpoint, 1, 1.0)  # settings that it refuses are better refused now
        elif request.solver not in SOLVERS:
            raise InputError("--solver", f"{request.solver!r} given; this model has unipc, {', '.join(SOLVERS)}")
        _, height, width = request.size
        shift = request.shift or (3.0 if height * width <= SMALL else 5.0)
        return replace(request, shift=shift)

    @property
    def _overlap(self) -> int:
        stride = self.checkpoint.strides[1]
        return self.tile // 4 // stride * stride

    @property
    def _units(self) -> list[int]:
        """Frames, rows and columns of pixels that one token covers."""
        return [stride * patch for stride, patch in zip(self.checkpoint.strides, self.config.patch, strict=True)]

    def _latents(self, request: Request) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        (frames, height, width), strides = request.size, self.checkpoint.strides
        return (frames - 1) // strides[0] + 1, height // strides[1], width // strides[2]

    def grid(self, request: Request) -> tuple[int, int, int]:
        frames, rows, columns = (
            size // patch for size, patch in zip(self._latents(request), self.config.patch, strict=True)
        )
        return frames, rows, columns

    def noise(self, request: Request) -> Tensor:
        generator = torch.Generator().manual_seed(request.seed)
        shape = (1, self.config.channels, *self._latents(request))
        return patchify(torch.randn(shape, generator=generator), self.config.patch)

    def rope(self, request: Request) -> tuple[Tensor, Tensor]:
        return rope_3d(self.grid(request), self.config.head_dim)

    def schedule(self, request: Request) -> tuple[list[float], Solver]:
        assert request.steps is not None
        assert request.shift is not None
        if request.solver is not None and request.solver in SOLVERS:
            return flow_times(request.steps, request.shift), SOLVERS[request.solver]()
        solver = UniPC(self.checkpoint, request.steps, request.shift)
        return solver.times, solver

    def encode(self, prompts: Sequence[str], mesh: DeviceMesh) -> Tensor:
        """Encoded text `[len(prompts), TEXT_LENGTH, text_dim]`.

        One rank loads the text encoder, releases it, and broadcasts the result.
        """
        text = None
        with agreed(mesh), outside():
            if is_first_rank(mesh):
                device = torch.device(mesh.device_type)
                text = encode_text(self.checkpoint, prompts, device, self.dtype, self.offload_text)
        shape = (len(prompts), TEXT_LENGTH, self.config.text_dim)
        return on_mesh(from_first_rank(text, shape, self.dtype, mesh), mesh["cp"], [REPLICATED], shape)

    def decode(self, tokens: Tensor, request: Request, mesh: DeviceMesh) -> Tensor:
        with agreed(mesh), outside():
            vae = load_vae(self.checkpoint).to(mesh.device_type)
        latents = unpatchify(tokens.float(), self.grid(request), self.config.patch)
        mean, deviation = (
            latents.new_tensor(self.checkpoint.vae[key])[:, None, None, None] for key in ("latents_mean", "latents_std")
        )
        video = decode(vae, latents * deviation + mean, mesh, self.tile, self._overlap, on_host=self.tiles_on_host)
        return video[0].transpose(0, 1).float().contiguous()


class UniPC:
    """diffusers' UniPC, unchanged: it is elementwise, so it runs on shards as on full latents.

    Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast
    Sampling of Diffusion Models", arXiv:2302.04867.

    Args:
        checkpoint: has settings of `diffusers.UniPCMultistepScheduler`.
        steps: sampling steps.
        shift: time shift.

    Raises:
        InputError: if the settings cannot be.
    """

    def __init__(self, checkpoint: WanCheckpoint, steps: int, shift: float) -> None:
        settings, diffusers = {**checkpoint.scheduler, "flow_shift": shift}, _import("diffusers")
        with _reading(checkpoint, "scheduler"):
            self.scheduler = diffusers.UniPCMultistepScheduler.from_config(settings)
            self.scheduler.set_timesteps(steps)
        self.step_index = 0

    @property
    def times(self) -> list[float]:
        """The times at which the model is evaluated, 1 being noise, and then 0, the end."""
        return [*(self.scheduler.timesteps.double() / self.scheduler.config.num_train_timesteps).tolist(), 0.0]

    def step(self, x: Tensor, velocity: Tensor, time: float, next_time: float) -> Tensor:
        timestep = self.scheduler.timesteps[self.step_index]
        self.step_index += 1
        return self.scheduler.step(velocity, timestep, x, return_dict=False)[0]


def encode_text(
    checkpoint: WanCheckpoint, prompts: Sequence[str], device: torch.device, dtype: torch.dtype, offload: bool
) -> Tensor:
    """UMT5's last hidden states `[len(prompts), TEXT_LENGTH, text_dim]`, zeros after the end of a prompt.

    Raises:
        InputError: if tokenizer or text encoder cannot be read.
    """
    transformers = _import("transformers")
    with _reading(checkpoint, "tokenizer") as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        words = tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).to(device)
    with _reading(checkpoint, "text_encoder") as folder:
        encoder, loaded = transformers.UMT5EncoderModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    _check_loaded(checkpoint, "text_encoder", loaded)
    encoder.eval().requires_grad_(False)
    if offload:
        _offload_layers(encoder.encoder, device)
    else:
        encoder.to(device)
    states = encoder(words.input_ids, words.attention_mask).last_hidden_state
    return states * words.attention_mask.unsqueeze(-1).to(states.dtype)


def _offload_layers(stack: nn.Module, device: torch.device) -> None:
    """Leave the layers of a T5 stack in host memory; each is copied to the device when it runs."""
    for name, part in stack.named_children():
        if name != "block":
            part.to(device)
    layers = [name for name, _ in stack.block.named_children()]
    stream(stack.block, [layers], lambda names: None, Storage(device, on_host=True))


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as Wan's own tokenizer does: repair Unicode, decode HTML entities, make each run of space one."""
    text = _import("ftfy").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def load_vae(checkpoint: WanCheckpoint) -> nn.Module:
    """diffusers' VAE, in float32, as Wan runs it.

    Raises:
        InputError: if it cannot be read.
    """
    diffusers = _import("diffusers")
    with _reading(checkpoint, "vae") as folder:
        vae, loaded = diffusers.AutoencoderKLWan.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    _check_loaded(checkpoint, "vae", loaded)
    return vae.eval().requires_grad_(False)


def _check_loaded(checkpoint: WanCheckpoint, part: str, loaded: Mapping[str, Any]) -> None:
    """Raise for tensors that a library left out, or filled with random numbers as no file has them."""
    problems = [
        f"{kind.removesuffix('_keys')}: {', '.join(sorted(map(str, loaded[kind]))[:4])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if loaded.get(kind)
    ]
    if problems:
        folder = checkpoint.components / part
        raise InputError(checkpoint.flag, f"{folder} does not fit its configuration; tensors {'; '.join(problems)}")


@contextmanager
def _reading(checkpoint: WanCheckpoint, part: str) -> Iterator[Path]:
    """The folder of a component; any error that a library raises while reading it becomes a one-line `InputError`."""
    folder = checkpoint.components / part
    try:
        yield folder
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(checkpoint.flag, f"{folder} cannot be read ({reason})") from error


def _import(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError("--model wan", f"needs {name} ({error}); pip install 'meshdiff[wan]'") from error
    if name in ("diffusers", "transformers"):
        # There are bars enough, and what their warnings are about is checked here.
        logs = importlib.import_module(f"{name}.utils.logging")
        logs.disable_progress_bar()
        logs.set_verbosity_error()
    return module
