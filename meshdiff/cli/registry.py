"""The models of `meshdiff run`: for each, functions that open and run it, and the flags that it takes.

A new model is a file in `meshdiff/models` with a `VideoModel`, a name in `ModelName` and an entry in `MODELS`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import tyro
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.diffusion.outputs import Outputs
from meshdiff.diffusion.request import Request
from meshdiff.errors import InputError
from meshdiff.models import DigitsModel, RandomModel, RandomShape, WanModel
from meshdiff.models.digits import WEIGHTS
from meshdiff.pipeline import Pipeline

__all__ = ["MODELS", "ModelEntry", "ModelFlags", "ModelName", "StrategyFlag", "StrategyName", "import_diffusers"]

ModelName = Literal["digits", "wan", "diffusers", "random"]
StrategyName = Literal["ulysses", "ring", "gather", "hybrid"]
StrategyFlag = Literal["auto", StrategyName]


@dataclass(frozen=True)
class ModelFlags:
    """Flags that say which model runs, and how."""

    model: ModelName = "digits"
    """The embedded model; or Wan text-to-video from --checkpoint (--model wan --help shows Wan's own defaults); or any
    pipeline of diffusers from --checkpoint, unmodified; or one of random weights and any size, to measure with."""
    checkpoint: str | None = None
    """Wan: a folder in diffusers' layout or in Wan's own, or a Hugging Face id. diffusers: the folder of a pipeline."""
    components: str | None = None
    """Wan: the folder of text encoder, tokenizer and VAE in diffusers' layout, where --checkpoint has none."""
    weights: Path | None = None
    """Weights of the embedded model (safetensors); those of the package by default."""
    shape: tyro.conf.OmitArgPrefixes[RandomShape] = field(default_factory=RandomShape)
    strategy: StrategyFlag = "auto"
    """How --cp ranks attend to each other's tokens; auto chooses by heads and length."""
    simulate: bool = False
    """Simulate all ranks inside this one process: any layout on a laptop, slowly."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs if there are any."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; the sampler's state is always float32. auto is bfloat16 for Wan and diffusers on
    GPUs, else float32."""
    compile: bool = False
    """Compile each transformer block with torch.compile: slow to start, faster to run. diffusers: compile
    what --capture captures."""
    capture: bool = False
    """diffusers: once calls of a transformer have settled, run what one rank computes and sends in them as a graph,
    without the model's Python, which takes longer than a GPU does for short sequences. From the fifth call on, or
    the sixth where the first finds text to shard."""
    shard_weights: bool = False
    """Each rank stores its part of every weight and gathers a block's at a time. Without it every rank stores all
    weights: --cp and --cfg divide the work and the activations only. diffusers: of
    transformers between the ranks of --cp alone, of text encoders and the VAE between all."""
    low_memory: Literal[0, 1, 2, 3] = 0
    """0: everything on the device. 1: decoded tiles are put together in host memory (Wan). 2: the text encoder, too,
    comes from host memory, a layer at a time. 3: so do the transformer's blocks. Slower each time, the same clip."""
    shard_text: bool = True
    """diffusers: all ranks of a request share the tokens of its prompt in the text encoders; without it every rank does
    all of it."""
    shard_vae: bool = True
    """diffusers: all ranks of a request share the rows of the images that the VAE decodes or encodes, with activations
    in parts; without it every rank does all of it."""
    tile: int = 256
    """Wan: pixels a side of the tiles that the ranks decode, a quarter of which overlaps; 0 decodes every frame in one
    piece, on every rank."""

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    @property
    def entry(self) -> ModelEntry:
        """The registry's entry of the model."""
        return MODELS[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        half = self.entry.checkpoint is not None and self.device_type == "cuda"
        chosen: torch.dtype = getattr(
            torch, ("bfloat16" if half else "float32") if self.dtype == "auto" else self.dtype
        )
        return chosen

    def open_model(self) -> Any:
        """The `VideoModel`, checked; the weights of a large one are read when they are needed."""
        return self.entry.open(self)

    def of_model(self) -> dict[str, object]:
        """The fields of `RunMetrics` on which a clip depends, besides those of its request."""
        return {
            "model": self.model,
            "checkpoint": self.checkpoint,
            "weights": None if self.weights is None else str(self.weights),
            "shape": dataclasses.asdict(self.shape) if "shape" in self.entry.flags else None,
            "dtype": str(self.torch_dtype).removeprefix("torch."),
            "shard_text": self.shard_text if "shard_text" in self.entry.flags else None,
            "shard_vae": self.shard_vae if "shard_vae" in self.entry.flags else None,
        }

    def of_run(self) -> dict[str, object]:
        """The fields of `RunMetrics` that follow from these flags."""
        return {
            **self.of_model(),
            "strategy": self.strategy,
            "compiled": self.compile,
            "simulated": self.simulate,
            "shard_weights": self.shard_weights,
            "low_memory": self.low_memory,
        }

    def check_model(self) -> None:
        """Raise `InputError` for flags that the model does not take, and for a missing one that it needs."""
        entry, defaults = self.entry, ModelFlags()
        if entry.checkpoint is not None and self.checkpoint is None:
            raise InputError("--checkpoint", f"is missing; name {entry.checkpoint}")
        for name in OF_SOME_MODELS:
            if getattr(self, name) != getattr(defaults, name) and name not in entry.flags:
                flag = "--dim, --depth, --heads" if name == "shape" else f"--{name.replace('_', '-')}"
                if getattr(defaults, name) is True:
                    flag = f"--no-{flag.removeprefix('--')}"
                others = " or ".join(other for other, its in MODELS.items() if name in its.flags)
                raise InputError(flag, f"is for --model {others}; this is --model {self.model}: leave it out")
        captures = "capture" in entry.flags and (self.capture or self.compile)
        if captures and (self.shard_weights or self.low_memory == 3):
            raise InputError(
                "--compile" if self.compile else "--capture",
                "needs the transformer's weights where they are, whole; leave it out, or --shard-weights and "
                "--low-memory 3",
            )
        if self.strategy not in entry.strategies:
            raise InputError(
                f"--strategy {self.strategy}",
                f"is not for --model {self.model}, whose heads are not known beforehand; leave it out, or name another",
            )


Facts = Mapping[str, Mapping[str, str]]
"""Fields of `RunMetrics` that only the run knows."""

Made = tuple[Request, Outputs, Facts]
"""A request with the sizes of the clip that was made, the clip, and the facts of the run."""


def _pipeline(flags: ModelFlags, model: Any, mesh: DeviceMesh) -> Pipeline:
    return Pipeline(
        model,
        mesh,
        dtype=flags.torch_dtype,
        compile=flags.compile,
        shard_weights=flags.shard_weights,
        offload=flags.low_memory >= 3,
        strategy=flags.strategy,
    )


@dataclass(frozen=True)
class ModelEntry:
    """A model of the command line."""

    open: Callable[[ModelFlags], Any]
    """Function that returns the `VideoModel`, checked."""
    defaults: Callable[[], Request]
    """Function that returns the request whose values hold for flags that are not given."""
    flags: frozenset[str]
    """The flags in `OF_SOME_MODELS` that it takes."""
    strategies: tuple[str, ...] = get_args(StrategyFlag)
    """Values of --strategy that it takes."""
    checkpoint: str | None = None
    """Description of the value of --checkpoint, for an error message; None for models that do not need it."""
    run: Callable[[ModelFlags, Any, DeviceMesh], Any] = _pipeline
    """Function that returns an object with the `generate`, `mesh`, `replica` and `model` of a `Pipeline`."""
    branches: Callable[[Any, Request], int] = lambda model, request: len(request.branches)
    """Function that returns the number of guidance branches of a step, given the model."""
    unguided: Callable[[Any], str] = lambda model: "guidance scale 1"
    """Function that returns the reason for a single branch, or the condition for two, given the model."""
    made: Callable[[Any, Request, Any], Made] = lambda run, request, clip: (
        request,
        Outputs([clip], run.model.fps),
        {"captured": {}, "stored_weights": {}, "parts": {}, "inputs": {}},
    )
    """Function that returns a `Made`, given the result of `run`, the request, and what `generate` returned."""
    inputs: Callable[[Any, Request], Mapping[str, str]] = lambda model, request: {}
    """Function that returns the digest of each file that a request names, given the model, which has read them."""


OF_SOME_MODELS = (
    "weights",
    "shape",
    "checkpoint",
    "components",
    "tile",
    "capture",
    "shard_weights",
    "shard_text",
    "shard_vae",
    "low_memory",
    "simulate",
)
"""Flags that not every model takes."""


def import_diffusers() -> ModuleType:
    """The integration that runs pipelines of diffusers, which other models do not need.

    Raises:
        InputError: if diffusers is not installed.
    """
    try:
        module = importlib.import_module("meshdiff.integrations.diffusers_model")
    except ImportError as error:
        raise InputError(
            "--model diffusers", f"needs diffusers ({error}); pip install 'meshdiff[diffusers]'"
        ) from error
    importlib.import_module("diffusers.utils.logging").set_verbosity_error()
    importlib.import_module("diffusers.utils.logging").disable_progress_bar()
    return module


def _open_wan(flags: ModelFlags) -> WanModel:
    assert flags.checkpoint is not None
    return WanModel.open(
        flags.checkpoint,
        flags.components,
        tile=flags.tile,
        tiles_on_host=flags.low_memory >= 1,
        offload_text=flags.low_memory >= 2,
    )


def _run_diffusers(flags: ModelFlags, model: Any, mesh: DeviceMesh) -> Any:
    return import_diffusers().DiffusersRun(
        model,
        mesh,
        flags.torch_dtype,
        strategy=flags.strategy,
        capture=torch.compile if flags.compile else flags.capture,
        shard_weights=flags.shard_weights,
        offload=flags.low_memory >= 3,
        offload_text=flags.low_memory >= 2,
        shard_text=flags.shard_text,
        shard_vae=flags.shard_vae,
    )


OURS = frozenset({"shard_weights", "low_memory", "simulate"})
"""Flags of models whose code is in this package."""

MODELS: dict[ModelName, ModelEntry] = {
    "digits": ModelEntry(
        open=lambda flags: DigitsModel.load(flags.weights or WEIGHTS),
        defaults=lambda: DigitsModel.DEFAULTS,
        flags=OURS | {"weights"},
    ),
    "wan": ModelEntry(
        open=_open_wan,
        defaults=lambda: WanModel.DEFAULTS,
        flags=OURS | {"checkpoint", "components", "tile"},
        checkpoint="a folder or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or make a tiny one: "
        "python -m experiments.tiny_models.wan_checkpoint --out tiny-wan",
    ),
    "diffusers": ModelEntry(
        open=lambda flags: import_diffusers().DiffusersModel(flags.checkpoint),
        defaults=lambda: import_diffusers().DiffusersModel.DEFAULTS,
        flags=frozenset({"checkpoint", "capture", "shard_weights", "shard_text", "shard_vae", "low_memory"}),
        strategies=tuple(name for name in get_args(StrategyFlag) if name != "hybrid"),
        checkpoint="the folder of a pipeline, or make a tiny one: "
        "python -m experiments.tiny_models.pipelines flux --out tiny-flux",
        run=_run_diffusers,
        branches=lambda model, request: model.branches(request),
        unguided=lambda model: model.guidance_needs,
        made=lambda run, request, outputs: (run.done(request, outputs), outputs, run.facts(request)),
        inputs=lambda model, request: model.inputs(request),
    ),
    "random": ModelEntry(
        open=lambda flags: RandomModel(flags.shape),
        defaults=lambda: RandomModel.DEFAULTS,
        flags=OURS | {"shape"},
    ),
}
"""Models by the name that `--model` takes."""
