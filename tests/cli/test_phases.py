"""The phases of a run: they add up, and the picture shows them at any width."""

from __future__ import annotations

import io
import itertools
import time

import pytest
import torch
from rich.console import Console
from rich.table import Table

from meshdiff.cli.phases import CELLS, MOST_RANKS, PHASES, PhaseBars, Phases

MIB = 2**20
SECONDS = {"load": 2.0, "encode": 1.0, "sample": 4.0, "decode": 2.0, "write": 0.5, "other": 0.5}
PEAKS = {phase: (number + 1) * 100 * MIB for number, phase in enumerate(PHASES)}


def printed(bars: PhaseBars, width: int = 80, encoding: str = "utf-8") -> list[str]:
    """The lines of the picture, in a table as `meshdiff run` prints it."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    table = Table(show_header=False)
    table.add_row("", bars)
    Console(file=file, width=width).print(table)
    file.seek(0)
    return file.read().splitlines()


def cells(line: str) -> dict[str, int]:
    return {phase: line.count(cell) for phase, cell in CELLS.items()}


def test_phases_add_up_to_the_time_since_the_first(monkeypatch):
    ticks = itertools.count(1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    phases = Phases("cpu")
    for stage in ("reading prompt", "sampling", "preparing", "reading prompt", "sampling", "decoding", "preparing"):
        phases.on_stage(stage)
    phases.on_step(0)
    phases.begin("other")
    assert phases.seconds == {"other": 4.0, "encode": 2.0, "sample": 2.0, "decode": 1.0}
    assert phases.total == sum(phases.seconds.values()) == 9.0
    assert phases.steps == [1.0]


def test_the_peak_is_that_of_the_phase_in_which_it_was():
    phases = Phases("cpu", "load")
    phases.begin("decode")
    held = torch.ones(64 * MIB // 4)
    del held
    phases.begin("other")
    phases.begin("other")
    assert phases.peaks["decode"] - phases.peaks["load"] > 50 * MIB
    assert phases.peaks["decode"] - phases.peaks["other"] > 50 * MIB


def test_a_bar_shows_the_parts_of_the_time():
    bar, *legend = printed(PhaseBars([SECONDS], [PEAKS]))[1:-1]
    found = cells(bar)
    whole = sum(found.values())
    assert whole > 40
    for phase, seconds in SECONDS.items():
        assert abs(found[phase] - whole * seconds / 10) <= 1, phase
    assert "10.00 s" in bar
    assert len(legend) == len(PHASES)
    for line, phase in zip(legend, PHASES, strict=True):
        assert f"{phase} " in line
        assert f"{SECONDS[phase]:.2f} s" in line
        assert f"{SECONDS[phase] * 10:.0f}%" in line
        assert f"{PEAKS[phase] // MIB} MiB" in line


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("ranks", [1, 3, 12])
def test_the_picture_is_as_wide_as_the_terminal(width, ranks):
    seconds = [{phase: value * (1 + rank) for phase, value in SECONDS.items()} for rank in range(ranks)]
    lines = printed(PhaseBars(seconds, [PEAKS] * ranks), width)
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= width
    bars = [line for line in lines if "rank " in line]
    assert len(bars) == min(ranks, MOST_RANKS)
    longest = sum(cells(bars[-1]).values())
    assert len(bars[-1]) - longest < 30  # all that is left
    assert abs(sum(cells(bars[0]).values()) - longest * (1 + ranks - len(bars)) / ranks) <= 1
    assert any("the slowest 8 of 12 ranks" in line for line in lines) == (ranks > MOST_RANKS)


def test_terminals_without_blocks_have_letters():
    bar = printed(PhaseBars([SECONDS], [PEAKS]), encoding="ascii")[1]
    assert bar.count("s") - 1 > bar.count("d") > bar.count("w") > 0  # one is that of seconds


def test_a_run_of_no_time_is_drawn():
    assert "0.00 s" in printed(PhaseBars([{"sample": 0.0}], [{"sample": 0}]))[1]
