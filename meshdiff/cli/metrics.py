"""Metrics of a run: time, memory, communication, versions."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import meshdiff
from meshdiff.cli.phases import Phases
from meshdiff.diffusion.request import Request
from meshdiff.distributed.comms import CommsCounter
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.mesh import Layout
from meshdiff.pipeline import Pipeline

__all__ = ["RunMetrics", "collect", "device_name"]


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
    frames: int | None
    """Frames of each video; None, as height and width, if there is audio alone."""
    height: int | None
    width: int | None
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
    inputs: dict[str, str]
    """SHA-256 of each file that options of a pipeline of diffusers name, by its name."""
    shard_weights: bool
    shard_text: bool | None
    shard_vae: bool | None
    low_memory: int
    seconds_total: float
    """Seconds from prompt to frames, without loading the transformer and writing files."""
    seconds_by_phase: list[dict[str, float]]
    """Seconds of each phase, of each rank of the replica: of loading the model, which a list does once; of encoding
    (text and inputs), sampling and decoding; of writing, which the first rank does; and of all between ("other").
    Without "load" and "write" they add up to the time from prompt to frames."""
    seconds_per_step: list[float]
    median_seconds_per_step: float | None
    """Median without the first step, which includes one-time work; None of a pipeline that does not report its
    steps."""
    peak_memory_bytes: list[int]
    """Peak memory of each rank of the replica while it made the clip; see `Phases`. One entry in a simulation."""
    peak_memory_by_phase: list[dict[str, int]]
    """Peak memory of each phase in bytes, of each rank."""
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

    def written(self, phases: Phases) -> RunMetrics:
        """These metrics, of the first rank, with what it took to write the clip."""
        seconds, peaks = self.seconds_by_phase, self.peak_memory_by_phase
        return replace(
            self,
            seconds_by_phase=[{**seconds[0], **phases.seconds}, *seconds[1:]],
            peak_memory_by_phase=[{**peaks[0], **phases.peaks}, *peaks[1:]],
        )


def collect(
    pipeline: Pipeline,
    request: Request,
    layout: Layout,
    phases: Phases,
    loading: Phases,
    comms: CommsCounter,
    described: Mapping[str, Any],
) -> RunMetrics:
    """Gather the metrics of a finished run on every rank of the replica that made it; a collective.

    Args:
        pipeline: the pipeline that made the clip.
        request: with nothing left open.
        layout: the mesh's.
        phases, loading, comms: of the run, all phases ended, and of loading the model before it.
        described: the other fields of `RunMetrics`.
    """
    own = (
        {**loading.seconds, **phases.seconds},
        {**loading.peaks, **phases.peaks},
        max(phases.peaks.values()),
        phases.start_memory,
        comms.as_dict(),
    )
    ranks = all_gather_object(own, pipeline.mesh)
    return RunMetrics(
        layout=asdict(layout),
        world_size=layout.world_size,
        replica=pipeline.replica,
        **asdict(request),
        **described,
        seconds_total=phases.total,
        seconds_by_phase=[seconds for seconds, *_ in ranks],
        seconds_per_step=phases.steps,
        median_seconds_per_step=statistics.median(phases.steps[1:] or phases.steps) if phases.steps else None,
        peak_memory_bytes=[peak for _, _, peak, _, _ in ranks],
        peak_memory_by_phase=[peaks for _, peaks, *_ in ranks],
        start_memory_bytes=[start for *_, start, _ in ranks],
        comms=_largest([traffic for *_, traffic in ranks]),
        device=device_name(phases.device_type),
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
