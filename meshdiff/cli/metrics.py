"""Metrics of a run: time, memory, communication, versions."""

from __future__ import annotations

import contextlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import meshdiff
from meshdiff.diffusion.request import Request
from meshdiff.distributed.comms import CommsCounter
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.mesh import Layout
from meshdiff.pipeline import Pipeline

__all__ = ["PeakMemory", "RunMetrics", "Timer", "collect", "device_name"]


class Timer:
    """Measures the seconds of each stage and each sampling step; pass its methods to `Pipeline.generate`."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.steps: list[float] = []
        self._stages: list[tuple[str, float]] = []
        self._last = self.start = time.perf_counter()

    def on_stage(self, stage: str) -> None:
        self._last = self._now()
        self._stages.append((stage, self._last))

    def on_step(self, step: int) -> None:
        now = self._now()
        self.steps.append(now - self._last)
        self._last = now

    def finish(self) -> tuple[float, dict[str, float]]:
        """Seconds of the run, and of each stage."""
        end = self._now()
        ends = [*(start for _, start in self._stages[1:]), end]
        return end - self.start, {name: stop - start for (name, start), stop in zip(self._stages, ends, strict=True)}

    def _now(self) -> float:
        if self.device_type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class PeakMemory:
    """The peak memory of this process from here on: of the GPU's allocator on CUDA, of the process on CPU.

    Attributes:
        start: bytes that it holds already: weights, and on a CPU all imported modules.
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        if device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: resets what `so_far` reads
        self.start = self.so_far()

    def so_far(self) -> int:
        """The peak so far, in bytes."""
        if self.device_type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            return next(
                1024 * int(line.split()[1])
                for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
                if line.startswith("VmHWM")
            )
        except (OSError, StopIteration):  # elsewhere: of the whole life of the process
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class RunMetrics:
    """The contents of `metrics.json`."""

    model: str
    checkpoint: str | None
    weights: str | None
    shape: dict[str, int] | None
    """Shape of a model of random weights; None for others."""
    layout: dict[str, int]
    """Ranks of each mesh dim."""
    world_size: int
    replica: int
    """Index of the replica that made the clip."""
    simulated: bool
    """True if one process simulated all ranks, so that its times say nothing about speed."""
    prompt: str
    negative_prompt: str
    seed: int
    frames: int
    height: int
    width: int
    steps: int | None
    """Sampling steps; None, as for guidance_scale, if the default of a pipeline of diffusers was used."""
    guidance_scale: float | None
    solver: str
    shift: float | None
    strategy: str
    """Strategy of self-attention, as given by the flag."""
    dtype: str
    compiled: bool
    captured: dict[str, str]
    """The outcome of capturing the calls of each transformer, if capture was requested."""
    stored_weights: dict[str, str]
    """Of each part of a pipeline of diffusers with divided or offloaded weights, what each rank stores, and where."""
    parts: dict[str, str]
    """Of each part of a pipeline of diffusers that ran on the mesh, how much of it ran on shards."""
    shard_weights: bool
    shard_text: bool | None
    shard_vae: bool | None
    low_memory: int
    seconds_total: float
    """Seconds from prompt to frames, without loading the transformer and writing files."""
    seconds_by_stage: dict[str, float]
    seconds_per_step: list[float]
    median_seconds_per_step: float
    """Median without the first step, which includes one-time work."""
    peak_memory_bytes: list[int]
    """Peak memory of each rank of the replica while it made the clip; see `PeakMemory`. One entry in a simulation."""
    start_memory_bytes: list[int]
    """Memory that each of these ranks held before it made the clip."""
    comms: dict[str, dict[str, dict[str, int]]]
    """Calls by mesh dim and collective, and bytes that one rank sent to others (the rank that sent most)."""
    device: str
    threads_per_rank: int
    options: dict[str, object]
    """Options of the request that only this model has."""
    torch_version: str = torch.__version__
    meshdiff_version: str = field(default_factory=lambda: meshdiff.__version__)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def collect(
    pipeline: Pipeline,
    request: Request,
    layout: Layout,
    timer: Timer,
    memory: PeakMemory,
    comms: CommsCounter,
    described: Mapping[str, Any],
) -> RunMetrics:
    """Gather the metrics of a finished run on every rank of the replica that made it; a collective.

    Args:
        pipeline: the pipeline that made the clip.
        request: with nothing left open.
        layout: the mesh's.
        timer, memory, comms: those of the run.
        described: the other fields of `RunMetrics`.
    """
    seconds, stages = timer.finish()
    ranks = all_gather_object((memory.so_far(), memory.start, comms.as_dict()), pipeline.mesh)
    return RunMetrics(
        layout=asdict(layout),
        world_size=layout.world_size,
        replica=pipeline.replica,
        **asdict(request),
        **described,
        seconds_total=seconds,
        seconds_by_stage=stages,
        seconds_per_step=timer.steps,
        median_seconds_per_step=statistics.median(timer.steps[1:] or timer.steps),
        peak_memory_bytes=[peak for peak, _, _ in ranks],
        start_memory_bytes=[start for _, start, _ in ranks],
        comms=_largest([traffic for _, _, traffic in ranks]),
        device=device_name(timer.device_type),
        threads_per_rank=torch.get_num_threads(),
    )


def _largest(ranks: list[dict[str, dict[str, dict[str, int]]]]) -> dict[str, dict[str, dict[str, int]]]:
    """The largest of each number over ranks."""
    merged: dict[str, dict[str, dict[str, int]]] = {}
    for traffic in ranks:
        for dim, collectives in traffic.items():
            for name, numbers in collectives.items():
                most = merged.setdefault(dim, {}).setdefault(name, {"count": 0, "bytes": 0})
                merged[dim][name] = {key: max(most[key], numbers[key]) for key in most}
    return merged


def device_name(device_type: str) -> str:
    """The name of this machine's GPU for "cuda", or of its processor for "cpu"."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
