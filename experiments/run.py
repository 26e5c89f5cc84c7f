"""Make one clip from a prompt, on one device or on many.

One process:      python experiments/run.py
Two, guidance:    torchrun --nproc-per-node 2 experiments/run.py --cfg 2 --prompt "a 7 moving left"
Eight:            torchrun --nproc-per-node 8 experiments/run.py --cp 4 --cfg 2
Eight, played:    python experiments/run.py --cp 4 --cfg 2 --simulate
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError

from meshdiff.agreement import agreed, check_same, is_first_rank
from meshdiff.comms import CommsCounter
from meshdiff.errors import InputError
from meshdiff.launch import end_process, end_with_launcher, start_ranks
from meshdiff.media import write_video
from meshdiff.mesh import Layout, check_gpus, init_distributed, init_mesh, launched_world_size, torchrun_command
from meshdiff.metrics import RunMetrics, StepTimer, collect
from meshdiff.models.digits import WEIGHTS, DigitsModel
from meshdiff.output import COMPLETE, output_folder
from meshdiff.pipeline import Pipeline, check_request
from meshdiff.request import Request
from meshdiff.simulation import simulate


@dataclass(frozen=True)
class Config:
    """Make one clip from a prompt, on one device or on many."""

    request: tyro.conf.OmitArgPrefixes[Request] = field(default_factory=Request)
    cp: int | None = None
    """Context parallelism: ranks that share the sequence. By default what --cfg leaves of the world."""
    cfg: int | None = None
    """Guidance parallelism: ranks that share the guidance branches. By default 2 if the world is
    even and guidance is on."""
    simulate: bool = False
    """Play all ranks inside this one process: any layout on a laptop, slowly."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes GPUs if there are any."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations; the sampler's state is always float32."""
    threads: int = 1
    """CPU threads of each rank. Layouts give the same bits at equal thread counts; a GEMM that is
    split between threads adds up in another order."""
    compile: bool = False
    """Compile each transformer block with torch.compile: slow to start, faster to run."""
    weights: Path = WEIGHTS
    """Weights of the embedded model (safetensors); those of the package by default."""
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
        flat = {**flat.pop("request"), **flat}
        return {f"--{name.replace('_', '-')}": value for name, value in flat.items()}

    def check(self) -> None:
        """Raise `InputError` for combinations that cannot work, whatever the layout."""
        if self.simulate and self.compile:
            raise InputError("--compile", "does not work with --simulate; leave one of them out")
        if self.simulate and launched_world_size() > 1:
            raise InputError("--simulate", "plays every rank in one process; start it with python, not with torchrun")
        if self.threads < 1:
            raise InputError("--threads", f"{self.threads} given, needs at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda", "this machine has no usable GPU; use --device cpu")


def parse(arguments: list[str]) -> Config:
    """Read the flags; a parse error becomes an `InputError`, so that all ranks hear of it."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            config = tyro.cli(Config, args=arguments)
    except SystemExit as stop:
        if not stop.code:
            raise HelpAsked("--help", printed.getvalue().rstrip()) from None
        raise ParseError("flags", printed.getvalue().rstrip()) from None
    config.check()
    return config


class ParseError(InputError):
    """What tyro says about flags it cannot read, in its own words."""

    exit_code = 2

    def __str__(self) -> str:
        return self.problem


class HelpAsked(ParseError):
    """Not an error: the flags, explained."""

    exit_code = 0


def generate(config: Config, layout: Layout, model: DigitsModel, on_step) -> tuple[torch.Tensor, RunMetrics]:
    """The run itself, the same on every layout."""
    dtype = getattr(torch, config.dtype)
    with simulate(layout.world_size) if config.simulate else contextlib.nullcontext():
        mesh = init_mesh(layout, config.device_type)
        pipeline = Pipeline(model, mesh, dtype=dtype, compile=config.compile)
        timer = StepTimer(config.device_type)

        def after_step(step: int) -> None:
            timer(step)
            on_step(step)

        with CommsCounter(mesh) as comms:
            video = pipeline.generate(config.request, on_step=after_step)
        metrics = collect(
            config.request, layout, config.device_type, dtype, config.compile, config.simulate, timer, comms
        )
    return video, metrics


@contextlib.contextmanager
def progress_bar(steps: int, console: Console) -> Iterator:
    """A bar over sampling steps, on rank 0 only."""
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not is_first_rank()) as progress:
        task = progress.add_task("sampling", total=steps)
        yield lambda step: progress.advance(task)


def start_wandb(config: Config, layout: Layout, folder: Path):
    """A W&B run in `folder`, or None."""
    if config.wandb == "disabled":
        return None
    import wandb

    try:
        return wandb.init(
            project=config.wandb_project,
            mode=config.wandb,
            dir=folder,
            name=str(layout),
            config={**{k.lstrip("-"): str(v) for k, v in config.flags().items()}, "layout": dataclasses.asdict(layout)},
            settings=wandb.Settings(silent=True, console="off", init_timeout=20),
        )
    except (wandb.errors.Error, OSError) as error:
        reason = str(error).splitlines()[0]
        flags = f"--wandb {config.wandb} --wandb-project {config.wandb_project}"
        raise InputError(flags, f"{reason}; --wandb offline needs no account, --wandb disabled logs nothing") from error


def log_wandb(run, metrics: RunMetrics, folder: Path) -> None:
    """Every scalar, the time of each step, and the clip."""
    import wandb

    for step, seconds in enumerate(metrics.seconds_per_step):
        run.log({"seconds_per_step": seconds}, step=step)
    run.log({"video": wandb.Video(str(folder / "video.mp4"), format="mp4")})
    run.summary.update(metrics.as_dict())
    run.finish()


def summary(metrics: RunMetrics, out: Path) -> Table:
    """What a person wants to know at the end."""
    table = Table(show_header=False, title=metrics.prompt, title_style="bold")
    layout = ", ".join(f"{name} {size}" for name, size in metrics.layout.items() if name != "dp")
    played = " (simulated)" if metrics.simulated else ""
    ordered = sorted(metrics.seconds_per_step)
    table.add_row("layout", f"{layout}: {metrics.world_size} rank{'s' * (metrics.world_size > 1)}{played}")
    table.add_row("device", f"{metrics.device}, {metrics.threads_per_rank} threads a rank, {metrics.dtype}")
    table.add_row("time", f"{metrics.seconds_total:.2f} s, median step {ordered[len(ordered) // 2] * 1000:.0f} ms")
    table.add_row("memory", f"peak {max(metrics.peak_memory_bytes) / 2**20:.0f} MiB a rank")
    for dim, collectives in metrics.comms.items():
        for name, traffic in collectives.items():
            sent = f"{traffic['count']} x {name}, {traffic['bytes'] / 2**20:.2f} MiB sent by a rank"
            table.add_row(f"{dim} traffic", sent)
    table.add_row("written", str(out))
    return table


def write(video: torch.Tensor, metrics: RunMetrics, wandb_run, folder: Path) -> None:
    """All files of a run; the one that says it is complete comes last."""
    try:
        write_video(video, folder)
        if wandb_run is not None:
            log_wandb(wandb_run, metrics, folder)
        (folder / COMPLETE).write_text(json.dumps(metrics.as_dict(), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise InputError("--out", f"cannot be written ({error})") from error


def run(config: Config, layout: Layout) -> None:
    """Generate and write; every rank comes by here, rank 0 alone talks and writes."""
    console = Console()
    out = config.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{layout}"
    with contextlib.ExitStack() as stack:
        with agreed():
            model = DigitsModel.load(config.weights)
            check_request(model, config.request, layout)
        folder, wandb_run = Path(), None
        with agreed():
            if is_first_rank():
                folder = stack.enter_context(output_folder(out, config.overwrite))
                wandb_run = start_wandb(config, layout, folder)
        with progress_bar(config.request.steps, console) as on_step:
            video, metrics = generate(config, layout, model, on_step)
        with agreed():
            if not video.isfinite().all():
                raise InputError(f"--dtype {config.dtype}", "the clip is not made of numbers; try --dtype float32")
            if is_first_rank():
                write(video, metrics, wandb_run, folder)
                stack.close()  # the folder takes its name
    if is_first_rank():
        console.print(summary(metrics, out))


def main(arguments: list[str]) -> int:
    """Parse, agree with the other ranks, start more of them if need be, run; returns the exit code."""
    try:
        world = launched_world_size()
        if world > 1:
            init_distributed()
        with agreed():
            config = parse(arguments)
        check_same(config.flags())
        torch.set_num_threads(config.threads)
        with agreed():
            layout = Layout.resolve(world, len(config.request.branches), config.cfg, config.cp)
        if world == 1 and layout.world_size > 1 and not config.simulate:
            check_request(DigitsModel.load(config.weights), config.request, layout)
            if config.device_type == "cuda":
                check_gpus(layout.world_size)
            print(
                f"starting {layout.world_size} ranks on this machine, as would: {torchrun_command(layout)}", flush=True
            )
            return start_ranks(layout.world_size, os.path.abspath(__file__), arguments)
        run(config, layout)
    except InputError as error:
        code = getattr(error, "exit_code", 2)
        if is_first_rank():
            print(error, file=sys.stderr if code else sys.stdout, flush=True)
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:  # from a signal
        return int(stop.code or 0)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    # An exit that unwinds, so that nothing half-written stays behind.
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda number, frame: sys.exit(128 + number))
    end_with_launcher()
    exit_code = main(sys.argv[1:])
    # The first rank to end with an error makes torchrun end the others, whose exit codes are to say the same.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_process(exit_code)
