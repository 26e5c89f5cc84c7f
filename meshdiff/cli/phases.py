"""Phases of a run: where its time goes and how much memory each takes, and a picture of that for a terminal."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

__all__ = ["OTHER", "PHASES", "PhaseBars", "Phases"]

OTHER = "other"
PHASES = ("load", "encode", "sample", "decode", "write", OTHER)
"""Phases in their order; "other" is what is between them."""

OF_STAGES = {"reading prompt": "encode", "sampling": "sample", "decoding": "decode"}
"""The phases of the stages of `Pipeline.generate`."""


class Phases:
    """A clock that is always in one phase, so that the phases add up to the time since it was made.

    Args:
        device_type: "cuda" waits for the device when the phase changes, and measures its allocator; "cpu" measures the
            memory of the process.

    Attributes:
        seconds: of each phase that has been.
        peaks: the peak memory in each, in bytes: of the GPU's allocator on CUDA, of the process on CPU.
        steps: seconds of each sampling step.
        start_memory: bytes held when it was made: weights, and on a CPU all imported modules.
    """

    def __init__(self, device_type: str, phase: str = OTHER) -> None:
        self.device_type, self.phase = device_type, phase
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.steps: list[float] = []
        self.start_memory = self._reset_peak()
        self._begun = self._step_begun = self._now()

    def on_stage(self, stage: str) -> None:
        """Begin the phase of a stage of `generate`."""
        self.begin(OF_STAGES.get(stage, OTHER))

    def on_step(self, step: int) -> None:
        """Note that a sampling step has ended."""
        now = self._now()
        self.steps.append(now - self._step_begun)
        self._step_begun = now

    def begin(self, phase: str) -> None:
        """End the phase that is on, and begin another one."""
        now = self._now()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._begun
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self._peak())
        self._reset_peak()
        self.phase, self._begun, self._step_begun = phase, now, now

    @property
    def total(self) -> float:
        """Seconds of all phases that have ended."""
        return sum(self.seconds.values())

    def _now(self) -> float:
        if self.device_type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _reset_peak(self) -> int:
        """Let the peak be that from here on; returns the memory that is held now, in bytes."""
        if self.device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: resets VmHWM
        return self._peak()

    def _peak(self) -> int:
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


STYLES = {
    "load": "bright_blue",
    "encode": "magenta",
    "sample": "green",
    "decode": "yellow",
    "write": "cyan",
    OTHER: "white",
}
CELLS = {"load": "░", "encode": "▒", "sample": "█", "decode": "▓", "write": "▚", OTHER: "·"}
"""Cells of the bars, which differ without colors, too."""
LETTERS = {phase: phase[0] for phase in PHASES}
"""Cells where the terminal's encoding has no blocks."""

MOST_RANKS = 8
"""Ranks that have a bar of their own; the slowest of more are shown."""


class PhaseBars:
    """A bar of phases for each rank, and a line for each phase with its seconds, its part of the time and its memory.

    Args:
        seconds: of each phase, of each rank.
        peaks: peak memory of each phase in bytes, of each rank.
    """

    def __init__(self, seconds: Sequence[Mapping[str, float]], peaks: Sequence[Mapping[str, int]]) -> None:
        self.seconds, self.peaks = seconds, peaks

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = CELLS if options.encoding.lower().startswith("utf") else LETTERS
        totals = [sum(of_rank.values()) for of_rank in self.seconds]
        slowest = sorted(range(len(totals)), key=lambda rank: -totals[rank])[:MOST_RANKS]
        label = len(f"rank {len(totals) - 1} ")
        width = max(10, options.max_width - label - len(f" {max(totals):.2f} s"))
        for rank in sorted(slowest):
            yield Segment(f"rank {rank}".ljust(label))
            length = round(width * totals[rank] / (max(totals) or 1))
            for phase, count in self._shares(self.seconds[rank], length):
                yield Segment(cells[phase] * count, Style(color=STYLES[phase]))
            yield Segment(f" {totals[rank]:.2f} s\n")
        if len(totals) > len(slowest):
            yield Segment(f"the slowest {len(slowest)} of {len(totals)} ranks\n")
        yield from self._legend(cells, totals)

    def _shares(self, seconds: Mapping[str, float], length: int) -> Iterator[tuple[str, int]]:
        """The number of cells of each phase; their sum is the length, whatever is rounded."""
        total, before, begun = sum(seconds.values()) or 1.0, 0.0, 0
        for phase in PHASES:
            before += seconds.get(phase, 0.0)
            end = round(length * before / total)
            yield phase, end - begun
            begun = end

    def _legend(self, cells: Mapping[str, str], totals: Sequence[float]) -> RenderResult:
        """A line for each phase, of the rank that spends most on it."""
        for phase in PHASES:
            most = max(of_rank.get(phase, 0.0) for of_rank in self.seconds)
            if not most:
                continue
            share = max(
                of_rank.get(phase, 0.0) / (total or 1) for of_rank, total in zip(self.seconds, totals, strict=True)
            )
            peak = max(of_rank.get(phase, 0) for of_rank in self.peaks)
            memory = f"{peak / 2**20:8.0f} MiB" if peak else ""
            yield Segment(cells[phase], Style(color=STYLES[phase]))
            yield Segment(f" {phase:<6} {most:8.2f} s {share:5.0%}{memory}\n")
