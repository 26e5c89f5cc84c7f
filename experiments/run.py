"""Make one clip from a prompt, on one device or on many.

One process:      python experiments/run.py
Two, guidance:    torchrun --nproc-per-node 2 experiments/run.py --cfg 2 --prompt "a 7 moving left"
Eight:            torchrun --nproc-per-node 8 experiments/run.py --cp 4 --cfg 2
Eight, played:    python experiments/run.py --cp 4 --cfg 2 --simulate
Eight, Wan:       torchrun --nproc-per-node 8 experiments/run.py --model wan --checkpoint FOLDER --cp 4 --cfg 2
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import os
import signal
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a lost store is pages of C++ frames above the line about it

import torch
import tyro
from clips import make_clip, make_clips
from prompt_list import list_for_ranks, read_list
from torch.distributed.elastic.multiprocessing.errors import record

from meshdiff.cli.request_list import read_requests
from meshdiff.diffusion.request import Request
from meshdiff.distributed.consensus import agreed, check_same, is_first_rank
from meshdiff.distributed.failures import ended_by, ended_by_signal
from meshdiff.distributed.heartbeat import Heartbeats
from meshdiff.distributed.launch import end_process, end_with_launcher, print_any_letter, start_ranks
from meshdiff.distributed.mesh import Layout, check_gpus, torchrun_command
from meshdiff.distributed.world import init_distributed, launched_world_size
from meshdiff.errors import InputError
from meshdiff.models import DigitsModel, RandomModel, RandomShape, WanModel, WanRequest
from meshdiff.models.digits import WEIGHTS
from meshdiff.pipeline import check_strategy, prepare_request

LARGE = {
    "wan": "a folder or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or make a tiny one: "
    "python experiments/make_tiny_wan.py --out tiny-wan",
    "diffusers": "the folder of a pipeline, or make a tiny one: python experiments/tiny_pipelines flux --out tiny-flux",
}
"""Models that are read from --checkpoint, and what to name there."""


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
    strategy: Literal["auto", "ulysses", "ring", "gather", "hybrid"] = "auto"
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


def parse(arguments: list[str]) -> Config:
    """Read the flags; a parse error becomes an `InputError`, so that all ranks hear of it."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            config = tyro.cli(Config, args=arguments, default=_defaults(arguments))
    except SystemExit as stop:
        if not stop.code:
            raise HelpAsked("--help", printed.getvalue().rstrip()) from None
        raise ParseError("flags", printed.getvalue().rstrip()) from None
    config.check()
    return config


def _defaults(arguments: list[str]) -> Config:
    """Each model has its own idea of a clip, which the help is to show."""
    model = peek("--model", arguments)
    if model == "diffusers":
        return Config(request=integration().DiffusersRequest())
    return Config(request=WanRequest() if model == "wan" else Request())


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


def peek(flag: str, arguments: list[str]) -> str | None:
    """The value of a flag that has to be known before the others are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, nargs="?", dest="value")
    return parser.parse_known_args(arguments)[0].value


def timeout(arguments: list[str]) -> timedelta:
    """How long to wait for other ranks, with which the flags are yet to be agreed on."""
    given = peek("--timeout", arguments) or ""
    slow = torch.cuda.is_available() or peek("--model", arguments) in LARGE
    return timedelta(seconds=int(given) if given.isdecimal() and int(given) else 600 if slow else 60)


class ParseError(InputError):
    """What tyro says about flags it cannot read, in its own words."""

    exit_code = 2

    def __str__(self) -> str:
        return self.problem


class HelpAsked(ParseError):
    """Not an error: the flags, explained."""

    exit_code = 0


def main(arguments: list[str]) -> int:
    """Parse, agree with the other ranks, start more of them if need be, run; returns the exit code."""
    heartbeats, failed = Heartbeats(), False
    try:
        world = launched_world_size()
        if world > 1:
            init_distributed(timeout(arguments))
            heartbeats.start()
        with agreed():
            config = parse(arguments)
        check_same(config.flags())
        torch.set_num_threads(config.threads)
        with agreed():
            text = None if config.prompts is None else read_list(config, is_first_rank())
            entries = None if text is None else read_requests(text, config.request)
            requests = 1 if entries is None else max(1, sum(entry.request is not None for entry in entries))
            layout = config.layout(world, requests)
            if config.simulate and layout.dp > 1:
                raise InputError("--dp", "replicas do different things, which one process cannot play; leave out --dp")
        if world == 1 and layout.world_size > 1 and not config.simulate:
            model = config.open_model()
            check_strategy(model, layout, config.strategy)
            if entries is None:
                prepare_request(model, config.request, layout)
            if config.device_type == "cuda":
                check_gpus(layout.world_size)
            print(
                f"starting {layout.world_size} ranks on this machine, as would: {torchrun_command(layout)}", flush=True
            )
            with list_for_ranks(config, text) as changed:
                return start_ranks(layout.world_size, os.path.abspath(__file__), [*arguments, *changed])
        if entries is None:
            make_clip(config, layout)
        else:
            return make_clips(config, layout, entries)
    except Exception as error:
        failed = True
        code = ended_by(error, heartbeats)
        if code is None:
            raise
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:  # from a signal
        failed = True
        return ended_by_signal(int(stop.code or 0), heartbeats)
    finally:
        heartbeats.stop()
        # Of several ranks that failed, one might wait here for another; the process is about to end anyway.
        if torch.distributed.is_initialized() and not (failed and torch.distributed.get_world_size() > 1):
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    # An exit that unwinds, so that nothing half-written stays behind.
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda number, frame: sys.exit(128 + number))
    end_with_launcher()
    print_any_letter()
    exit_code = record(main)(sys.argv[1:]) or 0
    # The first rank to end with an error makes torchrun end the others, whose exit codes are to say the same.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_process(exit_code)
