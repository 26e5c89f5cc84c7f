"""Reports of the rows of a sweep: medians, tables, plots, and the same for Weights & Biases."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from meshdiff.cli.sweep.cells import Row
from meshdiff.errors import InputError

CELL = ["world_size", "dp", "cfg", "cp", "strategy", "frames"]
TRAFFIC = {
    "cp_all_to_all_bytes": "cp: all-to-all, ring",
    "cp_all_gather_bytes": "cp: all-gather",
    "cfg_all_gather_bytes": "cfg: all-gather",
    "other_bytes": "other",
}
SHARED = "more ranks than cores or GPUs, which they had to share: says nothing about scaling"
COLORS = {
    "cp, ulysses": "#1f77b4",
    "cp, ring": "#17becf",
    "cp, gather": "#9467bd",
    "cp, hybrid": "#7f7f7f",
    "cp, auto": "#1f77b4",
    "cfg": "#d62728",
    "dp": "#2ca02c",
    "best mix": "#ff7f0e",
}
"""The series of the plots; a test fails for a strategy that is missing, which no plot would show."""


Array = np.ndarray[Any, Any]


def medians(rows: Iterable[Row]) -> pd.DataFrame:
    """A table with a line for each cell: medians over its measurements, and its speed-up.

    `speed_up` compares sampling steps a second, of all replicas together, with those of the fewest ranks that could
    make clips of as many frames, which count as ideal, in the same turn. It is the median over turns; `slowest` and
    `fastest` are the range. `efficiency` is the speed-up divided by ranks. Reading prompts, decoding, and the first
    step, which includes one-time work, are not in it.
    """
    measured = pd.DataFrame([asdict(row) for row in rows if row.status == "ok"])
    measured["seconds"] = measured.seconds_per_step / measured.dp  # of a step of one clip, on average
    fewest = measured.groupby("frames").world_size.transform("min")
    first = measured[measured.world_size == fewest]
    in_turn = first.groupby(["frames", "repeat"]).seconds.min()
    usual = first.groupby("frames").seconds.median()  # for a turn in which it failed
    base = [in_turn.get((row.frames, row.repeat), usual[row.frames]) for row in measured.itertuples()]
    measured["speed_up"] = fewest * base / measured.seconds
    numbers = ["seconds_per_step", "seconds_per_clip", "start_memory_bytes", "peak_memory_bytes", *TRAFFIC, "speed_up"]
    grouped = measured.groupby(CELL)
    cells = (
        grouped[numbers]
        .median()
        .join(
            grouped.agg(
                slowest=("speed_up", "min"),
                fastest=("speed_up", "max"),
                measurements=("repeat", "count"),
                oversubscribed=("oversubscribed", "any"),
            )
        )
    )
    cells["efficiency"] = cells.speed_up / cells.index.get_level_values("world_size")
    cells = cells.reset_index()
    cells["series"] = [_series(cell) for cell in cells.itertuples()]
    return cells


def _series(cell: Any) -> str:
    """The line of a plot that a cell is on."""
    divided = [name for name in ("dp", "cfg", "cp") if getattr(cell, name) > 1]
    if not divided:
        return "one rank"
    if len(divided) > 1:
        return "best mix"
    return f"cp, {cell.strategy}" if divided == ["cp"] else divided[0]


def layout_name(cell: Any) -> str:
    """A cell's layout in a few characters."""
    divided = [f"{name}{getattr(cell, name)}" for name in ("dp", "cfg", "cp") if getattr(cell, name) > 1]
    strategy = f" {cell.strategy}" if cell.cp > 1 and cell.strategy != "auto" else ""
    return (" ".join(divided) or "one rank") + strategy


def machine(rows: Sequence[Row]) -> str:
    """The machine, the versions and the model with which the rows were measured."""
    row = next(row for row in rows if row.status == "ok")
    guidance = "" if row.guidance_scale is None else f", guidance {row.guidance_scale:g}"
    return (
        f"{row.device} ({row.places}), torch {row.torch_version}, {row.dtype}; model "
        f"{' '.join(filter(None, (row.model, row.checkpoint, row.run_flags)))}, {row.height} x {row.width} pixels"
        f"{guidance}"
    )


# Tables


def alone(cells: pd.DataFrame, dim: str) -> pd.DataFrame:
    """The cells that divide nothing but that mesh dim, and those that divide nothing."""
    others = [name for name in ("dp", "cfg", "cp") if name != dim]
    return cells[(cells[others] == 1).all(axis=1)]


def table_of(cells: pd.DataFrame, dim: str) -> str:
    """The speed-up by ranks of one mesh dim, as Markdown; the best strategy of each."""
    lines = [
        f"| frames | {dim} | s / step | speed-up | efficiency |{' strategy |' * (dim == 'cp')}",
        f"|---|---|---|---|---|{'---|' * (dim == 'cp')}",
    ]
    for (frames, size), group in cells.groupby(["frames", dim]):
        best = group.loc[group.speed_up.idxmax()]
        mark = "*" * bool(best.oversubscribed)
        line = (
            f"| {frames} | {size}{mark} | {best.seconds_per_step:.3f} | {best.speed_up:.2f}x ({best.slowest:.2f} to "
            f"{best.fastest:.2f}) | {best.efficiency:.0%} |"
        )
        lines.append(line + f" {best.strategy if size > 1 else ''} |" * (dim == "cp"))
    return "\n".join(lines)


TITLES = {"cp": "Context parallelism", "cfg": "CFG parallelism", "dp": "Data parallelism (steps of all replicas)"}


def tables(rows: Sequence[Row]) -> str:
    """Markdown tables of each mesh dim alone, and of the mixes, with the machine named."""
    cells = medians(rows)
    parts = [f"Measured on {machine(rows)}. Sampling steps; medians, and the range over turns."]
    for dim, title in TITLES.items():
        divided = alone(cells, dim)
        if (divided[dim] > 1).any():
            parts.append(f"### {title}\n\n{table_of(divided, dim)}")
    mixes = cells[cells.series == "best mix"].sort_values(["frames", "world_size", "speed_up"])
    if len(mixes):
        lines = ["| frames | ranks | layout | speed-up | efficiency |", "|---|---|---|---|---|"]
        for cell in mixes.itertuples():
            ranks = f"{cell.world_size}{'*' * cell.oversubscribed}"
            lines.append(
                f"| {cell.frames} | {ranks} | {layout_name(cell)} | {cell.speed_up:.2f}x | {cell.efficiency:.0%} |"
            )
        parts.append("### Mixes\n\n" + "\n".join(lines))
    if cells.oversubscribed.any():
        parts.append(f"\\* {SHARED}")
    return "\n\n".join(parts) + "\n"


def write_tables(rows: Sequence[Row], out: Path) -> None:
    (out / "tables.md").write_text(tables(rows), encoding="utf-8")


def summary(rows: Sequence[Row]) -> Table:
    """A table of every cell for the terminal; for each number of ranks the fastest comes last."""
    table = Table("frames", "ranks", "layout", "s / step", "speed-up", "peak MiB")
    for cell in medians(rows).sort_values(["frames", "world_size", "speed_up"]).itertuples():
        table.add_row(
            str(cell.frames),
            f"{cell.world_size}{'*' * cell.oversubscribed}",
            layout_name(cell),
            f"{cell.seconds_per_step:.3f}",
            f"{cell.speed_up:.2f}x",
            f"{cell.peak_memory_bytes / 2**20:.0f}",
        )
    return table


# Plots


def draw(rows: Sequence[Row], out: Path) -> None:
    """Write all plots as PNG files."""
    cells = medians(rows)
    for name, plot in PLOTS.items():
        figure = plot(cells)
        shared = f"hollow, *: {SHARED}\n" if cells.oversubscribed.any() else ""
        figure.suptitle(TITLE[name], fontsize=12)
        figure.supxlabel(f"{shared}{machine(rows)}", fontsize=7, color="0.4")
        figure.savefig(out / f"{name}.png", dpi=150, facecolor="white")


TITLE = {
    "scaling": "Sampling steps a second against ranks",
    "memory": "Memory of a rank while it makes a clip",
    "traffic": "What a rank sends to others for a clip",
    "layouts": "Seconds a step by layout (one replica, the best strategy)",
}


def _figure(columns: int, rows: int = 1, width: float = 3.6, height: float = 3.0) -> tuple[Figure, Array]:
    figure = Figure(figsize=(max(6.4, width * columns), height * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _lines(cells: pd.DataFrame, column: str, largest: bool) -> dict[str, pd.DataFrame]:
    """The best cell of each world size for each series; all series start at the same cell, the one of fewest ranks."""
    start = cells[cells.world_size == cells.world_size.min()].nlargest(1, "speed_up")
    lines = {}
    for series in COLORS:
        own = cells[cells.series == series]
        if len(own):
            by_size = own.groupby("world_size")[column]
            best = own.loc[by_size.idxmax() if largest else by_size.idxmin()]
            missing = start[~start.world_size.isin(best.world_size)]
            lines[series] = pd.concat([missing, best]).sort_values("world_size")
    return lines


def _legend(figure: Figure, grid: Array) -> None:
    """Draw one legend for all panels, which may have different lines."""
    found: dict[str, Artist] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    order = [label for label in ("ideal", "1/N", *COLORS) if label in found]
    figure.legend([found[label] for label in order], order, fontsize=8, loc="outside right center")


def _ranks_axis(axes: Axes, sizes: Iterable[int]) -> None:
    ticks = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
    axes.set_xlabel("ranks")
    axes.grid(alpha=0.3)


def _points(axes: Axes, line: pd.DataFrame, values: pd.Series, series: str, errors: Array | None = None) -> None:
    """Draw a line whose points are hollow where ranks had to share cores."""
    color = COLORS[series]
    axes.errorbar(line.world_size, values, errors, color=color, lw=1.5, capsize=3, label=series)
    for shared, face in ((False, color), (True, "white")):
        chosen = (line.oversubscribed == shared).to_numpy()
        axes.plot(line.world_size[chosen], values[chosen], "o", color=color, markerfacecolor=face, ms=5)


def plot_scaling(cells: pd.DataFrame) -> Figure:
    """Speed-up and efficiency against ranks, with the ideal, for each number of frames."""
    all_frames = sorted(cells.frames.unique())
    figure, grid = _figure(len(all_frames), rows=2)
    sizes = np.array(sorted(cells.world_size.unique()))
    for (top, bottom), frames in zip(grid.T, all_frames, strict=True):
        top.plot(sizes, sizes, "--", color="0.5", label="ideal")
        bottom.axhline(100, ls="--", color="0.5")
        for series, line in _lines(cells[cells.frames == frames], "speed_up", largest=True).items():
            spread = np.array([line.speed_up - line.slowest, line.fastest - line.speed_up])
            _points(top, line, line.speed_up, series, spread)
            _points(bottom, line, 100 * line.efficiency, series, 100 * spread / line.world_size.to_numpy())
        top.set_title(f"{frames} frames", fontsize=10)
        top.set_ylabel("speed-up")
        bottom.set_ylabel("efficiency, %")
        top.set_ylim(0)
        bottom.set_ylim(0, max(125, 100 * (cells.fastest / cells.world_size).max() * 1.05))
        for axes in (top, bottom):
            _ranks_axis(axes, sizes)
    _legend(figure, grid)
    return figure


def plot_memory(cells: pd.DataFrame) -> Figure:
    """Memory of a rank beyond its memory before the clip, against 1/N."""
    all_frames = sorted(cells.frames.unique())
    figure, grid = _figure(len(all_frames))
    sizes = np.array(sorted(cells.world_size.unique()))
    for axes, frames in zip(grid[0], all_frames, strict=True):
        own = cells[cells.frames == frames]
        own = own.assign(held=(own.peak_memory_bytes - own.start_memory_bytes) / 2**20)
        fewest = own.world_size.min()
        most = own[own.world_size == fewest].held.max()
        axes.plot(sizes, most * fewest / sizes, "--", color="0.5", label="1/N")
        for series, line in _lines(own, "held", largest=False).items():
            _points(axes, line, line.held, series)
        axes.set_ylim(0)
        axes.set_title(f"{frames} frames, beyond {own.start_memory_bytes.median() / 2**20:.0f} MiB before", fontsize=10)
        axes.set_ylabel("MiB")
        _ranks_axis(axes, sizes)
    _legend(figure, grid)
    return figure


def plot_traffic(cells: pd.DataFrame) -> Figure:
    """Bytes by collective, a bar for each layout, at the most frames."""
    own = cells[(cells.frames == cells.frames.max()) & (cells.world_size > 1)].sort_values(["world_size", "dp", "cfg"])
    figure, grid = _figure(1, height=1.2 + 0.24 * len(own), width=7)
    axes = grid[0, 0]
    labels = [f"{layout_name(cell)}{'*' * cell.oversubscribed}  " for cell in own.itertuples()]
    left = np.zeros(len(own))
    for (column, name), color in zip(TRAFFIC.items(), ("#1f77b4", "#17becf", "#d62728", "#7f7f7f"), strict=True):
        sent = own[column].to_numpy(dtype=float) / 2**20
        if sent.any():
            axes.barh(labels, sent, left=left, color=color, label=name)
        left += sent
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.2f}" if total else " nothing", va="center", fontsize=8)
    axes.set_xlabel(f"MiB a rank sends, clip of {cells.frames.max()} frames")
    axes.set_xlim(0, 1.15 * left.max(initial=1e-3))
    axes.invert_yaxis()
    if left.any():
        axes.legend(fontsize=8)
    return figure


def plot_layouts(cells: pd.DataFrame) -> Figure:
    """A heat map of cfg x cp for each number of frames."""
    all_frames = sorted(cells.frames.unique())
    one = cells[cells.dp == 1]
    figure, grid = _figure(len(all_frames), width=2.2 + 0.7 * one.cp.nunique(), height=2.2 + 0.3 * one.cfg.nunique())
    for axes, frames in zip(grid[0], all_frames, strict=True):
        own = one[one.frames == frames]
        best = own.loc[own.groupby(["cfg", "cp"]).seconds_per_step.idxmin()]
        seconds = best.pivot(index="cfg", columns="cp", values="seconds_per_step")
        image = axes.imshow(seconds, cmap="viridis_r", aspect="auto", vmin=0)
        axes.set_xticks(range(seconds.shape[1]), seconds.columns)
        axes.set_yticks(range(seconds.shape[0]), seconds.index)
        axes.set(xlabel="cp", ylabel="cfg")
        axes.set_title(f"{frames} frames", fontsize=10)
        for cell in best.itertuples():
            place = seconds.columns.get_loc(cell.cp), seconds.index.get_loc(cell.cfg)
            light = cell.seconds_per_step > 0.5 * seconds.max().max()
            text = f"{cell.seconds_per_step:.3g} s{'*' * cell.oversubscribed}" + f"\n{cell.strategy}" * (cell.cp > 1)
            axes.text(*place, text, ha="center", va="center", fontsize=9, color="white" if light else "black")
        figure.colorbar(image, ax=axes, label="s / step")
    return figure


PLOTS = {"scaling": plot_scaling, "memory": plot_memory, "traffic": plot_traffic, "layouts": plot_layouts}


# Weights & Biases


def log_to_wandb(rows: Sequence[Row], out: Path, mode: Literal["disabled", "offline", "online"], project: str) -> None:
    """A run for each cell, in the group that is named as the folder; measurements are its steps, medians its summary.

    A cell that an earlier run of the sweep has logged with as many measurements is not logged again.

    Raises:
        InputError: if W&B cannot be reached.
    """
    if mode == "disabled":
        return
    import wandb

    measured = ("repeat", "status", "error", "seconds_per_step", "seconds_per_clip", "peak_memory_bytes")
    told = [field.name for field in dataclasses.fields(Row) if field.name not in (*measured, "start_memory_bytes")]
    for cell in medians(rows).to_dict("records"):
        own = [row for row in rows if row.status == "ok" and all(getattr(row, key) == cell[key] for key in CELL)]
        name = str(own[0].cell)
        number = f"{out.name}-{name}-{len(own)}"[-128:]
        if list((out / "wandb").glob(f"*run-*-{glob.escape(number)}")):
            continue
        config = {key: getattr(own[0], key) for key in told}
        try:
            str(out.absolute()).encode()  # here, before W&B has logged pages about it
            logged = wandb.init(
                project=project,
                group=out.name,
                name=name,
                id=number,
                dir=out,
                mode=mode,
                config=config,
                settings=wandb.Settings(silent=True, console="off", init_timeout=20),
            )
        except (wandb.errors.Error, OSError, UnicodeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"--wandb {mode}", f"{reason}; what was measured is kept, --resume logs it") from error
        for row in own:
            logged.log({key: getattr(row, key) for key in measured if key not in ("status", "error")})
        logged.summary.update({key: value for key, value in cell.items() if key not in CELL})
        logged.finish()
