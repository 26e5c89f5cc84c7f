"""`meshdiff sweep`: time layouts side by side on this machine, each in processes of its own, and draw what comes out.

A cell is a layout and a number of frames. Each measurement of a cell is a torchrun of `meshdiff run` that makes one
clip for each replica. Cells take turns, so that a slow hour of the machine disturbs all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from meshdiff.cli import run
from meshdiff.cli.config import Config as RunConfig
from meshdiff.cli.metrics import device_name
from meshdiff.cli.registry import ModelName, StrategyFlag, StrategyName
from meshdiff.cli.sweep.cells import CLIPS, Cell, Row, measure, read_rows, write_rows
from meshdiff.cli.sweep.report import draw, log_to_wandb, summary, write_tables
from meshdiff.distributed.mesh import Layout
from meshdiff.errors import InputError
from meshdiff.models import VideoModel
from meshdiff.pipeline import check_strategy, prepare_request

RESULTS = "results.csv"
ASKED = "sweep.json"


@dataclass(frozen=True)
class Config:
    """Time layouts side by side on this machine, and draw what comes out.

    Each measurement is a torchrun of meshdiff run that makes one clip for each replica. Layouts take turns, so that a
    slow hour of the machine disturbs all of them alike.
    """

    world_sizes: tuple[int, ...] = ()
    """Numbers of ranks; by default 1, 2, 4, ... up to the number of GPUs, or of cores."""
    layouts: Literal["all", "auto"] = "all"
    """all: every dp x cfg x cp of as many ranks, by each strategy; auto: the one that run.py would choose."""
    strategies: tuple[StrategyName, ...] = get_args(StrategyName)
    """Of attention, for layouts that divide the sequence; those that do not fit the model are left out."""
    frames: tuple[int, ...] = (8, 16)
    """Frames of the clips; a set of cells for each."""
    height: int | None = None
    """Height in pixels; by default 64 for --model random, else what run.py takes."""
    width: int | None = None
    """Width in pixels; likewise."""
    steps: int = 4
    """Sampling steps of a clip; the time of a cell is that of the median step."""
    guidance_scale: float | None = None
    """1 turns guidance off, and leaves --cfg nothing to divide; by default what run.py takes."""
    model: ModelName = "random"
    """Embedded digits are too small a model to gain by more ranks; random weights can be of any size."""
    checkpoint: str | None = None
    """Of --model wan, or of diffusers: a pipeline that makes clips. Small ones: python -m
    experiments.tiny_models.wan_checkpoint --out tiny-wan, or python -m experiments.tiny_models.pipelines wan --out
    tiny-wan"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; auto takes GPUs if there are any."""
    run_flags: str = ""
    """More flags for run.py, as one word: --run-flags="--dim 1024 --compile"."""
    repeats: int = 3
    """Measurements of each cell."""
    oversubscribe: bool = False
    """Allow more ranks than there are cores or GPUs; they are marked in all that is written."""
    timeout: int = 1800
    """Seconds after which a measurement is given up and counts as failed."""
    out: Path | None = None
    """Folder to write; runs/<time>-sweep by default."""
    resume: bool = False
    """Go on with the sweep in --out: what is measured stays, what failed is tried again."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    """Weights & Biases: a run for each cell, all in one group; offline logs into --out and needs no account."""
    wandb_project: str = "meshdiff"
    """Weights & Biases project."""

    @property
    def places(self) -> int:
        """Number of GPUs of this machine, or of the cores that this process may use."""
        return torch.cuda.device_count() if self.on_gpus else len(os.sched_getaffinity(0))

    @property
    def on_gpus(self) -> bool:
        return self.device != "cpu" and torch.cuda.is_available()

    def described_places(self) -> str:
        one = "GPU" if self.on_gpus else "core"
        return f"{self.places} {one}{'s' * (self.places > 1)}"

    def check(self) -> None:
        """Raise `InputError` for flags that cannot work."""
        for name in ("world_sizes", "frames", "height", "width", "steps", "repeats", "timeout"):
            given = getattr(self, name)
            if given is not None and any(number < 1 for number in (given if isinstance(given, tuple) else [given])):
                raise InputError(f"--{name.replace('_', '-')}", f"{given} given, needs at least 1")
        for name in ("frames", "strategies"):
            if not getattr(self, name):
                raise InputError(f"--{name}", "needs at least one")
        too_many = [size for size in self.world_sizes if self.shares(size)]
        if too_many and not self.oversubscribe:
            raise InputError(
                "--world-sizes",
                f"{too_many[0]} ranks would share {self.described_places()}, so that their times say nothing about "
                "scaling; leave it out, or add --oversubscribe",
            )
        if self.resume and self.out is None:
            raise InputError("--resume", "goes on with a sweep; name its folder with --out")

    def sizes(self) -> list[int]:
        """World sizes, in order."""
        return sorted(set(self.world_sizes)) or [2**n for n in range(self.places.bit_length())]

    def flags(self, cell: Cell) -> list[str]:
        """Flags of run.py for a cell."""
        pixels = 64 if self.model == "random" else None
        given = {
            "model": self.model,
            "checkpoint": self.checkpoint,
            "height": self.height or pixels,  # which `check` keeps from being 0
            "width": self.width or pixels,
            "guidance-scale": self.guidance_scale,
            "steps": self.steps,
            "device": self.device,
            "wandb": "disabled",
            **cell.flags(),
        }
        own = {*given, "simulate", "prompts", "resume", "overwrite", "out", "wandb-project", "help"}
        for word in self.more():
            name = word.partition("=")[0].removeprefix("--").replace("_", "-")
            if word.startswith("--") and name in own:
                raise InputError("--run-flags", f"--{name} is not among those a sweep can hand on; it sets them itself")
        return [*self.more(), *(f"--{name}={value}" for name, value in given.items() if value is not None)]

    def more(self) -> list[str]:
        """The words of `run_flags`."""
        try:
            return shlex.split(self.run_flags)
        except ValueError as error:
            raise InputError("--run-flags", f"{self.run_flags!r} given ({error})") from error

    def shares(self, ranks: int) -> bool:
        """True if that many ranks have to share cores or GPUs."""
        threads = "1" if self.on_gpus else run.peek("--threads", self.more()) or "1"
        return ranks * (int(threads) if threads.isdecimal() else 1) > self.places

    def same_for_all(self) -> dict[str, object]:
        """Settings that must not change when a sweep is resumed, as its numbers are compared."""
        free = {"world_sizes", "layouts", "strategies", "frames", "repeats", "oversubscribe", "timeout", "out"}
        free |= {"resume", "wandb", "wandb_project"}
        same = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        device = device_name("cuda" if self.on_gpus else "cpu")
        return same | {"machine": f"{device}, {self.described_places()}, torch {torch.__version__}"}


def all_cells(config: Config) -> list[Cell]:
    """Every cell that run.py can do, with each world size together.

    Raises:
        InputError: if it cannot do the clips even on one rank.
    """
    found = []
    for frames in dict.fromkeys(config.frames):
        alone = run.parse(config.flags(Cell(Layout(), "auto", frames)))
        model = alone.open_model()
        prepare_request(model, alone.request, Layout())
        branches = alone.entry.branches(model, alone.request)
        for size in config.sizes():
            for layout in layouts_of(config, size, branches):
                choose = layout.cp > 1 and config.layouts == "all"
                strategies: list[StrategyFlag] = [*dict.fromkeys(config.strategies)] if choose else ["auto"]
                found += [Cell(layout, s, frames) for s in strategies if fits(model, alone, layout, s)]
    if not found:
        raise InputError("--world-sizes", "no layout of that many ranks can do these clips; add 1")
    return found


def layouts_of(config: Config, size: int, branches: int) -> list[Layout]:
    """Layouts of a world size."""
    if config.layouts == "auto":
        return [Layout.auto(size, guided=branches > 1)]
    return [
        Layout(cfg=cfg, cp=size // dp // cfg, dp=dp)
        for dp in range(1, size + 1)
        for cfg in range(1, branches + 1)
        if size % (dp * cfg) == 0
    ]


def fits(model: VideoModel, alone: RunConfig, layout: Layout, strategy: StrategyFlag) -> bool:
    """True if run.py accepts the layout and the strategy, and every rank has something to do."""
    try:
        dataclasses.replace(alone, strategy=strategy).check()
        prepare_request(model, alone.request, layout)
        check_strategy(model, layout, strategy)
    except InputError:
        return False
    return True


def begin(config: Config, out: Path) -> list[Row]:
    """Make the folder of a sweep, or continue in it; returns the rows that it has measured."""
    asked = json.loads(json.dumps(config.same_for_all()))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / ASKED).is_file():
            raise InputError("--out", f"{out} holds what is no sweep; name another folder")
        if not config.resume:
            raise InputError("--out", f"{out} holds a sweep already; name another folder, or add --resume")
        check_same_sweep(asked, out)
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(f"{CLIPS}*"):  # of a sweep that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    if not (out / ASKED).exists():
        (out / f".{ASKED}").write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
        (out / f".{ASKED}").replace(out / ASKED)
    return read_rows(out / RESULTS) if (out / RESULTS).is_file() else []


def check_same_sweep(asked: dict[str, object], out: Path) -> None:
    """Raise `InputError` if the sweep in that folder is of other clips, or of another machine."""
    try:
        before = dict(json.loads((out / ASKED).read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError("--out", f"{out / ASKED} cannot be read ({error}); name another folder") from error
    for name, value in asked.items():
        if before.get(name) != value:
            flag = "--resume" if name == "machine" else f"--{name.replace('_', '-')}"
            raise InputError(flag, f"the sweep in {out} has {before.get(name)!r}, and this is {value!r}")


def measure_all(config: Config, cells: list[Cell], rows: list[Row], out: Path, console: Console) -> list[Row]:
    """Do the measurements that are missing, in rounds over all cells."""
    wanted = {(cell, n) for n in range(config.repeats) for cell in cells}
    rows = [row for row in rows if row.status == "ok" or (row.cell, row.repeat) not in wanted]
    done = {(row.cell, row.repeat) for row in rows}
    turns = [(cell, n) for n in range(config.repeats) for cell in cells if (cell, n) not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(turns))
        for cell, repeat in turns:
            progress.update(task, description=str(cell))
            known = {
                "repeat": repeat,
                "oversubscribed": config.shares(cell.layout.world_size),
                "places": config.described_places(),
                "run_flags": config.run_flags,
            }
            row = measure(cell, config.flags(cell), known, out, config.timeout)
            rows = [*rows, row]
            write_rows(out / RESULTS, rows)
            if row.status == "failed":
                progress.console.print(f"{cell} failed: {row.error}", markup=False)
            progress.advance(task)
    return rows


def main(config: Config) -> int:
    """Measure, write, draw; returns 1 if a measurement failed."""
    console = Console()
    config.check()
    out = config.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-sweep"
    cells = all_cells(config)
    try:
        rows = begin(config, out)
        console.print(f"{len(cells)} cells x {config.repeats} in {out}, on {config.described_places()}")
        rows = measure_all(config, cells, rows, out, console)
        good = [row for row in rows if row.status == "ok"]
        if good:
            write_tables(rows, out)
            draw(rows, out)
            console.print(summary(rows))
    except OSError as error:
        raise InputError("--out", f"{out} cannot be written ({error.strerror or error})") from error
    what = "tables and plots" if good else "what was printed"
    console.print(f"{len(good)} measurements, {len(rows) - len(good)} failed; {what} in {out}")
    if good:
        log_to_wandb(rows, out, config.wandb, config.wandb_project)
    return 1 if len(good) < len(rows) else 0


def command(arguments: list[str]) -> int:
    """Run `main` as the work of this process, with signals set up; returns the exit code."""
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda number, frame: sys.exit(128 + number))
    try:
        return main(tyro.cli(Config, args=arguments, prog="meshdiff sweep"))
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            print("stopped; go on with --resume", file=sys.stderr)
        return 130
