"""What a run reports of itself: time, memory, communication, versions."""

from __future__ import annotations

import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, field

import torch

import meshdiff
from meshdiff.agreement import from_every_rank
from meshdiff.comms import CommsCounter
from meshdiff.mesh import Layout
from meshdiff.request import Request

__all__ = ["RunMetrics", "StepTimer", "collect"]


class StepTimer:
    """Measures the seconds of each sampling step; pass it as `on_step`."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.seconds: list[float] = []
        self.start = self._last = time.perf_counter()

    def __call__(self, step: int) -> None:
        if self.device_type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


@dataclass(frozen=True)
class RunMetrics:
    """The contents of `metrics.json`."""

    layout: dict[str, int]
    """Ranks of each mesh dim."""
    world_size: int
    simulated: bool
    """Whether one process played all ranks: its times say nothing about speed."""
    prompt: str
    negative_prompt: str
    seed: int
    frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    solver: str
    shift: float
    dtype: str
    compiled: bool
    seconds_total: float
    """From prompt to frames, loading and writing excluded."""
    seconds_per_step: list[float]
    peak_memory_bytes: list[int]
    """For each rank: of the GPU's allocator on CUDA, of the process on CPU. One entry in a simulation."""
    comms: dict[str, dict[str, dict[str, int]]]
    """By mesh dim and collective: calls, and bytes one rank sent to others (of the rank that sent most)."""
    device: str
    threads_per_rank: int
    torch_version: str = torch.__version__
    meshdiff_version: str = field(default_factory=lambda: meshdiff.__version__)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def collect(
    request: Request,
    layout: Layout,
    device_type: str,
    dtype: torch.dtype,
    compiled: bool,
    simulated: bool,
    timer: StepTimer,
    comms: CommsCounter,
) -> RunMetrics:
    """Gather the metrics of a finished run on every rank; a collective."""
    seconds = time.perf_counter() - timer.start
    ranks = from_every_rank((_peak_memory(device_type), comms.as_dict()))
    return RunMetrics(
        layout={"dp": 1, "cfg": layout.cfg, "cp": layout.cp},
        world_size=layout.world_size,
        simulated=simulated,
        **asdict(request),
        dtype=str(dtype).removeprefix("torch."),
        compiled=compiled,
        seconds_total=seconds,
        seconds_per_step=timer.seconds,
        peak_memory_bytes=[memory for memory, _ in ranks],
        comms=_largest([traffic for _, traffic in ranks]),
        device=torch.cuda.get_device_name() if device_type == "cuda" else _cpu_name(),
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


def _peak_memory(device_type: str) -> int:
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
