"""The cells of a sweep, and the measurement of one: a torchrun of run.py, and the metrics of its clips."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from meshdiff.cli.output import COMPLETE
from meshdiff.cli.queue import RESULTS
from meshdiff.distributed.launch import end_with_parent
from meshdiff.distributed.mesh import Layout

CLIPS = ".clips-"
"""Prefix of the names of temporary folders of clips, which are removed after their metrics are read."""
RUN = ("-m", "meshdiff", "run")
"""Arguments of torchrun in each measurement."""


@dataclass(frozen=True)
class Cell:
    """One setting to measure: a layout, the strategy of attention, and the number of frames."""

    layout: Layout
    strategy: str
    frames: int

    def __str__(self) -> str:
        strategy = "" if self.strategy == "auto" else f"-{self.strategy}"
        return f"dp{self.layout.dp}-cfg{self.layout.cfg}-cp{self.layout.cp}{strategy}-{self.frames}-frames"

    def flags(self) -> dict[str, Any]:
        """The flags of run.py for this cell."""
        return {**asdict(self.layout), "strategy": self.strategy, "frames": self.frames}


@dataclass(frozen=True)
class Row:
    """A line of `results.csv`: one measurement of one cell. The columns that a failed one lacks are empty."""

    world_size: int
    dp: int
    cfg: int
    cp: int
    strategy: str
    """Strategy of attention; auto where there is nothing to choose."""
    frames: int
    repeat: int
    """Round of measurements, from 0. One round is measured at about the same time, unless `--resume` added some."""
    oversubscribed: bool
    """True if ranks had to share cores or GPUs, so that the times say nothing about scaling."""
    status: str
    """"ok", or "failed"."""
    error: str = ""
    model: str = ""
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    checkpoint: str | None = None
    run_flags: str = ""
    """Additional flags of run.py."""
    seconds_per_step: float | None = None
    """The median, the first step left out if there are others; of the slowest replica. A step of `dp` clips at once."""
    seconds_per_clip: float | None = None
    """Seconds from prompt to frames, of the slowest replica."""
    start_memory_bytes: int | None = None
    """Memory of a rank before the clip, of the rank that holds most: weights, and on a CPU all imported modules."""
    peak_memory_bytes: int | None = None
    """Peak memory of a rank, of the rank that held most."""
    cp_all_to_all_bytes: int | None = None
    """Bytes that a rank sent for a clip on the mesh dim cp; the steps of a ring count as all-to-alls as well."""
    cp_all_gather_bytes: int | None = None
    cfg_all_gather_bytes: int | None = None
    other_bytes: int | None = None
    """Bytes of all other collectives: for a prompt that one rank encodes, and for weights that are sharded."""
    device: str = ""
    places: str = ""
    """Number of cores, or of GPUs, of the machine, in words."""
    dtype: str = ""
    torch_version: str = ""
    meshdiff_version: str = ""

    @property
    def cell(self) -> Cell:
        return Cell(Layout(cfg=self.cfg, cp=self.cp, dp=self.dp), self.strategy, self.frames)


def read_rows(path: Path) -> list[Row]:
    """The rows of a `results.csv`; invalid lines are left out."""
    kinds = {field.name: str(field.type) for field in fields(Row)}
    rows = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for line in csv.DictReader(file):
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
                rows.append(Row(**{name: _value(line[name], kind) for name, kind in kinds.items()}))
    return rows


def _value(text: str, kind: str) -> Any:
    if kind.startswith("bool"):
        return {"true": True, "false": False}[text.lower()]  # spreadsheets write capitals
    if text == "" and "None" in kind:
        return None
    return {"int": int, "float": float, "str": str}[kind.split()[0]](text)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a `results.csv`, replacing an earlier one at once."""
    partial = path.with_name(f".{path.name}")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    partial.replace(path)


def measure(cell: Cell, flags: Sequence[str], known: Mapping[str, Any], folder: Path, timeout: float) -> Row:
    """Run a cell once.

    Args:
        cell, flags: the cell to run, and the flags of run.py.
        known: other columns of the row.
        folder: of the sweep; the output of a failed run is kept in it.
        timeout: seconds.
    """
    layout = cell.layout
    known = {**known, **asdict(layout), "world_size": layout.world_size}
    known |= {"strategy": cell.strategy, "frames": cell.frames}
    log = folder / f"failed-{cell}-{known['repeat']}.log"
    clips = Path(tempfile.mkdtemp(prefix=CLIPS, dir=folder))
    try:
        code, printed = _torchrun(layout.world_size, [*flags, *_list_of_clips(clips, layout.dp)], timeout)
        log.unlink(missing_ok=True)
        if code == 0:
            return Row(**known, status="ok", **_measured(clips / "out"))
        log.write_text(printed, encoding="utf-8")
        return Row(**known, status="failed", error=_reason(code, printed, clips / "out", timeout))
    finally:
        shutil.rmtree(clips, ignore_errors=True)


def _list_of_clips(folder: Path, count: int) -> list[str]:
    """Flags for one clip for each replica."""
    listed = folder / "list.jsonl"
    listed.write_text(
        "".join(json.dumps({"name": f"clip-{i}", "seed": i}) + "\n" for i in range(count)), encoding="utf-8"
    )
    return ["--prompts", str(listed), "--out", str(folder / "out")]


def _torchrun(ranks: int, flags: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """Run torchrun; returns its exit code, or None if it took too long, and its output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*launcher, *RUN, *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=end_with_parent,  # or it would go on beside a sweep that is resumed
    )
    try:
        printed, _ = process.communicate(timeout=timeout)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        return None, _end(process)
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[str]) -> str:
    """End torchrun, which ends its ranks; returns its output."""
    process.terminate()
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def _measured(out: Path) -> dict[str, Any]:
    """The columns that the clips of a run give."""
    clips = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob(f"*/{COMPLETE}"))]
    first = clips[0]
    sent = {
        f"{dim}_{collective}_bytes": traffic["bytes"]
        for dim, collectives in first["comms"].items()
        for collective, traffic in collectives.items()
    }
    named = {name: sent.pop(name, 0) for name in ("cp_all_to_all_bytes", "cp_all_gather_bytes", "cfg_all_gather_bytes")}
    same = ["model", "height", "width", "steps", "device", "dtype", "torch_version", "meshdiff_version"]
    same += ["guidance_scale", "checkpoint"]
    return {
        "seconds_per_step": max(clip["median_seconds_per_step"] for clip in clips),
        "seconds_per_clip": max(clip["seconds_total"] for clip in clips),
        "start_memory_bytes": max(max(clip["start_memory_bytes"]) for clip in clips),
        "peak_memory_bytes": max(max(clip["peak_memory_bytes"]) for clip in clips),
        **named,
        "other_bytes": sum(sent.values()),
        **{name: first[name] for name in same},
    }


def _reason(code: int | None, printed: str, out: Path, timeout: float) -> str:
    """The reason why a run failed, in a line."""
    if code is None:
        return f"took longer than --timeout {timeout:g} seconds"
    with contextlib.suppress(OSError, ValueError):
        for line in (out / RESULTS).read_text(encoding="utf-8").splitlines():
            if error := json.loads(line)["error"]:
                return error
    killed = re.search(r"exitcode\s*: -(\d+)", printed)
    noise = re.compile(r"[WEI]\d{4} |\s|Traceback|=+$|-+$|.* FAILED$|torch\.distributed")
    lines = [line for line in printed.splitlines() if line.strip() and not noise.match(line)]
    wrong = [
        line
        for line in lines
        if re.match(r"(--\w|lost (rank|the launcher)|cannot start|out of memory|[\w.]*Error\b)", line)
    ]
    if killed and not wrong:
        return f"a rank was killed by signal {killed[1]}"
    return (wrong or lines or [f"exit code {code}"])[0].split(" ([")[0]  # where gloo's own words begin
