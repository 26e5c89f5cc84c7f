"""The speed of layouts on this machine, against their speed if communication were free.

Every layout is measured twice in the same processes, in turn: as it is, and with each
collective replaced by a local copy of the same size. The ratio of the two is the cost of
communication; it holds on a noisy machine because both halves are equally disturbed.

    python -m experiments.benchmarks.layouts
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from meshdiff import CommsCounter, Layout, Pipeline, Request, init_mesh
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.launch import end_process, start_ranks
from meshdiff.models import RandomModel, RandomShape


@dataclass(frozen=True)
class Config:
    """Time layouts side by side, and what their communication costs."""

    dim: int = 768
    """Width of the transformer."""
    heads: int = 12
    """Attention heads."""
    depth: int = 2
    """Blocks."""
    frames: int = 16
    """Frames of the clip; a token covers 2."""
    size: int = 128
    """Height and width in pixels; a token covers 8 x 8."""
    steps: int = 3
    """Sampling steps of each measurement; the first is not counted."""
    rounds: int = 3
    """Measurements of each layout, in turn with its copy without communication."""
    ranks: int = 0
    """Most ranks to try, one thread each; the number of cores by default."""
    worker: tuple[int, int, float, str] | None = None
    """Used between processes: measure one layout (cfg, cp, guidance scale) and write it to a file."""

    @property
    def tokens(self) -> int:
        return (self.frames // 2) * (self.size // 8) ** 2


class LocalCopies(TorchDispatchMode):
    """Collectives move no data between ranks: each returns a local copy of the right size."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, torch.distributed.tensor.DTensor) for t in types):
            return NotImplemented
        if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
            return args[0].repeat(args[1], *[1] * (args[0].ndim - 1))
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            received = args[0].new_empty(sum(args[1]), *args[0].shape[1:])
            return received.copy_(args[0][: received.shape[0]])
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        return func(*args, **(kwargs or {}))


def median_step(pipeline: Pipeline, request: Request) -> float:
    """Seconds of a step, the first one left out, of the slowest rank."""
    dist.barrier()
    ends = [time.perf_counter()]
    pipeline.generate(request, on_step=lambda step: ends.append(time.perf_counter()))
    steps = [end - start for start, end in pairwise(ends[1:])]
    return max(all_gather_object(statistics.median(steps)))


def measure(config: Config, layout: Layout, scale: float) -> dict[str, Any]:
    """Seconds of each round as it is and without communication, and the bytes of a step; runs on every rank."""
    torch.set_num_threads(1)
    mesh = init_mesh(layout, "cpu")
    model = RandomModel(RandomShape(dim=config.dim, depth=config.depth, heads=config.heads))
    pipeline = Pipeline(model, mesh)
    request = replace(
        model.DEFAULTS,
        frames=config.frames,
        height=config.size,
        width=config.size,
        steps=config.steps,
        guidance_scale=scale,
    )
    with CommsCounter(mesh) as comms:
        median_step(pipeline, request)
    real, copies = [], []
    for _ in range(config.rounds):
        real.append(median_step(pipeline, request))
        with LocalCopies():
            copies.append(median_step(pipeline, request))
    return {"real": real, "copies": copies, "comms": comms.as_dict()}


def worker_flags(config: Config, layout: Layout, scale: float, result: Path) -> list[str]:
    names = ("dim", "heads", "depth", "frames", "size", "steps", "rounds")
    flags = [f"--{name}={getattr(config, name)}" for name in names]
    return [*flags, "--worker", str(layout.cfg), str(layout.cp), str(scale), str(result)]


def in_new_ranks(config: Config, layout: Layout, scale: float) -> dict[str, Any]:
    """`measure` in fresh processes, so that no layout inherits another's memory or threads."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        flags = worker_flags(config, layout, scale, result)
        code = start_ranks(layout.world_size, ["-m", __spec__.name, *flags])
        if code:
            raise SystemExit(code)
        return json.loads(result.read_text(encoding="utf-8"))


def independent(config: Config, processes: int) -> float:
    """Seconds of a step of one branch in processes that run at once and know nothing of each other."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{i}.json" for i in range(processes)]
        started = [
            subprocess.Popen([sys.executable, "-m", __spec__.name, *worker_flags(config, Layout(), 1.0, result)])
            for result in results
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit(1)
        return max(statistics.median(json.loads(result.read_text(encoding="utf-8"))["real"]) for result in results)


def seconds_to(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - start


def main(config: Config) -> None:
    console = Console(width=110)
    cores = len(os.sched_getaffinity(0))
    most = config.ranks or cores
    console.print(
        f"{config.depth} blocks of dim {config.dim}, {config.heads} heads, {config.tokens} tokens, fp32, "
        f"one thread a rank, {cores} cores, torch {torch.__version__}, {platform.machine()}"
    )
    console.print("More ranks than cores cannot speed anything up; they are not measured.")
    sizes = [n for n in (1, 2, 4, 8, 16) if n <= most]
    for title, layouts, scale in (
        ("Context parallelism (one guidance branch)", [Layout(1, n) for n in sizes], 1.0),
        ("CFG parallelism (two guidance branches)", [Layout(n, 1) for n in sizes if n <= 2], 3.0),
    ):
        table = Table("ranks", "s / step", "speed-up", "efficiency", "without communication", "ratio", title=title)
        first = None
        for layout in layouts:
            result = in_new_ranks(config, layout, scale)
            seconds = statistics.median(result["real"])
            first = first or seconds
            ratios = [a / b for a, b in zip(result["real"], result["copies"], strict=True)]
            table.add_row(
                str(layout.world_size),
                f"{seconds:.3f}",
                f"{first / seconds:.2f}x",
                f"{first / seconds / layout.world_size:.0%}",
                f"{statistics.median(result['copies']):.3f}",
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            )
        console.print(table)
    if most > 1:
        one_round = dataclasses.replace(config, rounds=1)
        pairs = [
            (statistics.median(in_new_ranks(one_round, Layout(2, 1), 3.0)["real"]), independent(one_round, 2))
            for _ in range(config.rounds)
        ]
        ratios = [together / alone for together, alone in pairs]
        console.print(
            f"cfg=2 against two independent processes of one branch each, in turn: "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    console.print(f"import meshdiff: {seconds_to('-c', 'import meshdiff'):.1f} s; ", end="")
    console.print(f"meshdiff run --help: {seconds_to('-m', 'meshdiff', 'run', '--help'):.1f} s")


if __name__ == "__main__":
    parsed = tyro.cli(Config)
    if parsed.worker is None:
        main(parsed)
    else:
        cfg, cp, guidance_scale, path = parsed.worker
        outcome = measure(parsed, Layout(cfg, cp), guidance_scale)
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(outcome), encoding="utf-8")
        dist.destroy_process_group()
        end_process(0)
