"""The flags of `meshdiff run`."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import tyro

from meshdiff.diffusion.request import Request
from meshdiff.distributed.mesh import Layout
from meshdiff.distributed.world import launched_world_size
from meshdiff.errors import InputError
from meshdiff.models import DigitsModel, RandomModel, RandomShape, WanModel
from meshdiff.models.digits import WEIGHTS

LARGE = {
    "wan": "a folder or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or make a tiny one: "
    "python -m experiments.tiny_models.wan_checkpoint --out tiny-wan",
    "diffusers": "the folder of a pipeline, or make a tiny one: "
    "python -m experiments.tiny_models.pipelines flux --out tiny-flux",
}
"""Models that are read from --checkpoint, and what to name there."""

Strategy = Literal["auto", "ulysses", "ring", "gather", "hybrid"]


@dataclass(frozen=True)
class Config:
    """Make one clip from a prompt, on one device or on many."""

    model: Literal["digits", "wan", "diffusers", "random"] = "digits"
    """The embedded model; or Wan text-to-video from --checkpoint (--model wan --help shows Wan's own defaults); or any
    pipeline of diffusers from --checkpoint, untouched; or one of random weights and any size, to measure with."""
    request: tyro.conf.OmitArgPrefixes[Request] = field(default_factory=Request)
    prompts: str | None = None
    """A list of requests: a prompt a line, or a JSON object a line with any of the request options (with _ for -) and
    a name; - reads it from standard input. The flags are what a line leaves out."""
    resume: bool = False
    """Go on with the list of --prompts in --out: what is complete there is not done again."""
    cp: int | None = None
    """Context parallelism: ranks that share the sequence. By default what --cfg leaves of the world."""
    dp: int | None = None
    """Data parallelism: replicas of --cp x --cfg ranks that take the requests of --prompts in turn. By default as many
    as the requests keep busy."""
    cfg: int | None = None
    """Guidance parallelism: ranks that share the guidance branches. By default 2 if the world is
    even and guidance is on."""
    strategy: Strategy = "auto"
    """How --cp ranks attend to each other's tokens; auto chooses by heads and length."""
    simulate: bool = False
    """Play all ranks inside this one process: any layout on a laptop, slowly."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs if there are any."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; the sampler's state is always float32. auto is bfloat16 for Wan on GPUs, else
    float32."""
    threads: int = 1
    """CPU threads of each rank. Layouts give the same bits at equal thread counts; a GEMM that is
    split between threads adds up in another order."""
    timeout: int | None = None
    """Seconds that a rank waits for another in a collective before it gives up and says so; 60 for digits on a CPU,
    else 600, as ranks may then load, compile or decode for as long while others wait."""
    compile: bool = False
    """Compile each transformer block with torch.compile: slow to start, faster to run. diffusers: compile
    what --capture captures."""
    capture: bool = False
    """diffusers: once calls of a transformer have settled, run what one rank computes and sends in them as a program,
    without the model's Python, which takes longer than a GPU does for short sequences. From the fifth call on."""
    weights: Path | None = None
    """Weights of the embedded model (safetensors); those of the package by default."""
    shape: tyro.conf.OmitArgPrefixes[RandomShape] = field(default_factory=RandomShape)
    checkpoint: str | None = None
    """Wan: a folder in diffusers' layout or in Wan's own, or a Hugging Face id. diffusers: the folder of a pipeline."""
    components: str | None = None
    """Wan: the folder of text encoder, tokenizer and VAE in diffusers' layout, where --checkpoint has none."""
    shard_weights: bool = False
    """Each rank stores its part of every weight and gathers a block's at a time. Without it every rank stores all
    weights: --cp and --cfg divide the work and the activations only."""
    low_memory: Literal[0, 1, 2, 3] = 0
    """0: everything on the device. 1: decoded tiles are put together in host memory. 2: the text encoder, too, comes
    from host memory, a layer at a time. 3: so do the transformer's blocks. Slower each time, the same clip."""
    tile: int = 256
    """Wan: pixels a side of the tiles that the ranks decode, a quarter of which overlaps; 0 decodes the clip whole, on
    every rank."""
    out: Path | None = None
    """Folder to write; runs/<time>-<layout> by default."""
    overwrite: bool = False
    """Replace --out if it holds an earlier run."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    """Weights & Biases; offline logs into the run's own folder and needs no account."""
    wandb_project: str = "meshdiff"
    """Weights & Biases project."""

    @property
    def device_type(self) -> str:
        available = "cuda" if torch.cuda.is_available() else "cpu"
        return available if self.device == "auto" else self.device

    def flags(self) -> dict[str, object]:
        """Every flag and its value."""
        flat = dataclasses.asdict(self)
        flat = {**flat.pop("request"), **flat.pop("shape"), **flat}
        return {f"--{name.replace('_', '-')}": value for name, value in flat.items()}

    @property
    def torch_dtype(self) -> torch.dtype:
        fast = self.model in LARGE and self.device_type == "cuda"
        return getattr(torch, ("bfloat16" if fast else "float32") if self.dtype == "auto" else self.dtype)

    @property
    def branches(self) -> int:
        """Of the request that the flags describe; a list may hold others, which are done all the same."""
        if self.model == "diffusers":
            return self.open_model().branches(self.request)
        return len(self.request.branches)

    def layout(self, world: int, requests: int) -> Layout:
        """The layout of that many processes; raises `InputError` if there is none that the flags fit."""
        asked = (world, self.branches, self.cfg, self.cp, self.dp, requests)
        if self.model != "diffusers":
            return Layout.resolve(*asked)
        return Layout.resolve(*asked, unguided=self.open_model().guidance_needs)

    def of_model(self) -> dict[str, object]:
        """What `RunMetrics` says of the model: all that a clip depends on besides its request."""
        return {
            "model": self.model,
            "checkpoint": self.checkpoint,
            "weights": None if self.weights is None else str(self.weights),
            "shape": dataclasses.asdict(self.shape) if self.model == "random" else None,
            "dtype": str(self.torch_dtype).removeprefix("torch."),
        }

    def described(self) -> dict[str, object]:
        """What `RunMetrics` says of these flags."""
        return {
            **self.of_model(),
            "strategy": self.strategy,
            "compiled": self.compile,
            "captured": {},
            "simulated": self.simulate,
            "shard_weights": self.shard_weights,
            "low_memory": self.low_memory,
        }

    def open_model(self) -> Any:
        """The `VideoModel`, checked; the weights of a large one are read when they are needed."""
        if self.model == "digits":
            return DigitsModel.load(self.weights or WEIGHTS)
        if self.model == "random":
            return RandomModel(self.shape)
        assert self.checkpoint is not None
        if self.model == "diffusers":
            return integration().DiffusersModel(self.checkpoint)
        return WanModel.open(
            self.checkpoint,
            self.components,
            tile=self.tile,
            tiles_on_host=self.low_memory >= 1,
            offload_text=self.low_memory >= 2,
        )

    def check(self) -> None:
        """Raise `InputError` for combinations that cannot work, whatever the layout."""
        if self.model in LARGE and self.checkpoint is None:
            raise InputError("--checkpoint", f"is missing; name {LARGE[self.model]}")
        own = {"weights": ["digits"], "checkpoint": [*LARGE], "components": ["wan"], "capture": ["diffusers"]}
        for flag, of in own.items():
            if getattr(self, flag) not in (None, False) and self.model not in of:
                raise InputError(f"--{flag}", f"is for --model {' or '.join(of)}; this is --model {self.model}")
        if self.model == "diffusers":
            self.check_untouched()
        if self.shape != RandomShape() and self.model != "random":
            raise InputError("--dim, --depth, --heads", f"are for --model random; this is --model {self.model}")
        if self.resume and (self.prompts is None or self.out is None):
            raise InputError("--resume", "goes on with a list: name it with --prompts, and its folder with --out")
        if self.overwrite and self.prompts is not None:
            raise InputError("--overwrite", "is for a single clip; with --prompts, name another --out or add --resume")
        if self.dp is not None and self.dp > 1 and self.prompts is None:
            raise InputError("--dp", "divides the requests of --prompts; one request has nothing to divide")
        if self.simulate and self.compile:
            raise InputError("--compile", "does not work with --simulate; leave one of them out")
        if self.simulate and launched_world_size() > 1:
            raise InputError("--simulate", "plays every rank in one process; start it with python, not with torchrun")
        if self.timeout is not None and self.timeout < 1:
            raise InputError("--timeout", f"{self.timeout} given, needs at least 1")
        if self.threads < 1:
            raise InputError("--threads", f"{self.threads} given, needs at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda", "this machine has no usable GPU; use --device cpu")

    def check_untouched(self) -> None:
        """Raise `InputError` for what cannot be done to a model that others wrote."""
        for flag, default in (("shard_weights", False), ("low_memory", 0), ("simulate", False)):
            if getattr(self, flag) != default:
                raise InputError(
                    f"--{flag.replace('_', '-')}",
                    "is not for --model diffusers, whose code is not touched; leave it out",
                )
        if self.strategy == "hybrid":
            raise InputError(
                "--strategy hybrid",
                "is not for --model diffusers, whose heads are not known beforehand; leave it out, or name another",
            )


def integration() -> ModuleType:
    """What runs pipelines of diffusers, which other models do without.

    Raises:
        InputError: if it is not installed.
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
