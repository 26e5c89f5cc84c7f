"""Sweeps: which cells there are, what their numbers mean, and that one runs, stops, goes on and is logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image
from ranks import EXPERIMENTS
from wandb_log import read_log

from meshdiff import InputError, Layout
from meshdiff.attention.strategy import STRATEGIES
from meshdiff.cli.sweep import report as sweep_report
from meshdiff.cli.sweep.cells import Row, _reason, read_rows, write_rows
from meshdiff.cli.sweep.main import Config, all_cells, main

TINY = {
    "steps": 2,
    "height": 32,
    "width": 32,
    "run_flags": "--dim 48 --depth 1 --heads 4",
    "frames": (8,),
    "repeats": 1,
}


def layouts(config: Config, monkeypatch) -> set[str]:
    monkeypatch.setattr(Config, "places", 8)
    return {str(cell) for cell in all_cells(config)}


def test_every_layout_and_each_strategy_that_fits_is_a_cell(monkeypatch):
    config = Config(world_sizes=(4,), frames=(8,), run_flags="--heads 6 --dim 48")
    cp4 = {f"dp1-cfg1-cp4-{strategy}" for strategy in STRATEGIES}
    cp2 = {f"{outer}-cp2-{s}" for outer in ("dp2-cfg1", "dp1-cfg2") for s in STRATEGIES if s != "hybrid"}
    names = cp4 | cp2 | {"dp4-cfg1-cp1", "dp2-cfg2-cp1"}
    assert layouts(config, monkeypatch) == {f"{name}-8-frames" for name in names}


def test_auto_is_what_run_py_would_choose(monkeypatch):
    config = Config(layouts="auto", frames=(8, 16))
    chosen = ["dp1-cfg1-cp1", "dp1-cfg2-cp1", "dp1-cfg2-cp2", "dp1-cfg2-cp4"]
    assert layouts(config, monkeypatch) == {f"{name}-{n}-frames" for name in chosen for n in (8, 16)}
    unguided = replace(config, guidance_scale=1.0, frames=(8,))
    assert layouts(unguided, monkeypatch) == {f"dp1-cfg1-cp{n}-8-frames" for n in (1, 2, 4, 8)}


def test_a_layout_that_leaves_ranks_without_tokens_is_no_cell(monkeypatch):
    config = Config(world_sizes=(8,), frames=(2,), height=16, width=16, strategies=("ulysses",))  # 4 tokens
    names = ["dp2-cfg1-cp4-ulysses", "dp1-cfg2-cp4-ulysses", "dp2-cfg2-cp2-ulysses", "dp4-cfg1-cp2-ulysses"]
    names += ["dp4-cfg2-cp1", "dp8-cfg1-cp1"]
    assert layouts(config, monkeypatch) == {f"{name}-2-frames" for name in names}


def test_what_run_py_refuses_is_no_cell(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    found = layouts(Config(model="diffusers", checkpoint=str(tmp_path), world_sizes=(4,), frames=(9,)), monkeypatch)
    assert {name.split("-")[3] for name in found if "cfg1-cp4" in name} == {"ulysses", "ring", "gather"}


def row(layout: Layout, seconds: float, repeat: int = 0, **changes) -> Row:
    sizes = {"dp": layout.dp, "cfg": layout.cfg, "cp": layout.cp, "world_size": layout.world_size}
    strategy = "ulysses" if layout.cp > 1 else "auto"
    common = {"frames": 8, "strategy": strategy, "status": "ok", "oversubscribed": layout.world_size > 4}
    sent = {"cp_all_to_all_bytes": 10**6 * (layout.cp - 1), "cp_all_gather_bytes": 10**5, "cfg_all_gather_bytes": 0}
    memory = {"start_memory_bytes": 10**8, "peak_memory_bytes": 10**8 + 10**8 // layout.cp, "other_bytes": 0}
    told = {
        "model": "random",
        "height": 64,
        "width": 64,
        "steps": 4,
        "guidance_scale": 4.0,
        "device": "a processor",
        "places": "4 cores",
    }
    fields = {**sizes, **common, **sent, **memory, **told, "seconds_per_step": seconds, "seconds_per_clip": 4 * seconds}
    return Row(**{**fields, "repeat": repeat, **changes})


ROWS = [
    *(row(Layout(), 8.0 * slow, n) for n, slow in enumerate((1, 2, 1))),
    *(row(Layout(1, 2), 5.0 * slow, n) for n, slow in enumerate((1, 2, 1))),  # the machine was slow for a turn
    *(row(Layout(1, 2), seconds, n, strategy="ring") for n, seconds in enumerate((8.0, 8.0, 4.0))),
    *(row(Layout(1, 1, dp=2), 10.0 * slow, n) for n, slow in enumerate((1, 2, 1))),
    row(Layout(2, 2), 2.0),
    row(Layout(1, 8), 4.0),
    row(Layout(2, 1), 0.0, status="failed", seconds_per_step=None, error="--cfg: no"),
]


LONGER = [(Layout(1, 2), 12.0, 0), (Layout(1, 4), 8.0, 0), (Layout(1, 4), 6.0, 1)]


def test_speed_up_is_of_clips_a_second_in_the_same_turn():
    cells = sweep_report.medians(ROWS).set_index(["world_size", "dp", "cfg", "cp", "strategy"])
    assert cells.loc[(1, 1, 1, 1, "auto"), "speed_up"] == 1
    assert cells.loc[(2, 1, 1, 2, "ulysses"), ["speed_up", "slowest", "fastest"]].tolist() == [1.6, 1.6, 1.6]
    assert cells.loc[(2, 1, 1, 2, "ring"), ["speed_up", "slowest", "fastest"]].tolist() == [2, 1, 2]
    assert cells.loc[(2, 2, 1, 1, "auto"), "speed_up"] == 1.6  # two clips in 10 s, and one in 8
    assert cells.loc[(4, 1, 2, 2, "ulysses"), ["speed_up", "efficiency", "series"]].tolist() == [4, 1, "best mix"]
    assert (2, 1, 2, 1, "auto") not in cells.index


def test_without_one_rank_the_fewest_count_as_ideal():
    cells = sweep_report.medians([r for r in ROWS if r.world_size > 1]).set_index(["world_size", "strategy", "dp"])
    assert cells.loc[(2, "ulysses", 1), "efficiency"] <= 1
    assert cells.loc[(4, "ulysses", 1), "speed_up"] == 2 * 5 / 2


def test_where_one_rank_failed_the_fewest_of_those_frames_are_the_base(tmp_path):
    longer = [
        row(Layout(1, 2), 12.0, frames=16),
        row(Layout(1, 4), 8.0, frames=16),
        row(Layout(1, 4), 6.0, 1, frames=16),
    ]
    failed = row(Layout(), 0.0, status="failed", frames=16, seconds_per_step=None)
    cells = sweep_report.medians([*ROWS, *longer, failed])
    cells = cells[cells.frames == 16].set_index("world_size")
    assert cells.loc[2, "speed_up"] == 2
    assert cells.loc[4, ["slowest", "fastest"]].tolist() == [3, 4]  # the second turn has no base of its own
    sweep_report.draw([*ROWS, *longer, failed], tmp_path)


def test_tables_say_where_it_was_measured_and_what_was_shared():
    text = sweep_report.tables(ROWS)
    assert "Measured on a processor (4 cores)" in text
    assert "| 8 | 2 | 8.000 | 2.00x (1.00 to 2.00) | 100% | ring |" in text
    assert "| 8 | 8* | 4.000 | 2.00x (2.00 to 2.00) | 25% | ulysses |" in text
    assert "### Data parallelism" in text
    assert "### CFG parallelism" not in text  # it failed
    assert sweep_report.SHARED in text
    assert "64 x 64 pixels, guidance 4." in text
    unsaid = sweep_report.tables([replace(row, guidance_scale=None) for row in ROWS])  # as the pipeline has it
    assert "64 x 64 pixels. Sampling" in unsaid


def test_plots_are_drawn(tmp_path):
    sweep_report.draw(ROWS, tmp_path)
    for name in sweep_report.PLOTS:
        picture = Image.open(tmp_path / f"{name}.png")
        assert min(picture.size) > 300
        assert len(picture.getcolors(maxcolors=10**6)) > 10
    sweep_report.draw(ROWS[:1], tmp_path)  # a single cell has nothing to compare with


def test_rows_survive_the_file_and_half_a_line_does_not(tmp_path):
    write_rows(tmp_path / "results.csv", ROWS)
    assert read_rows(tmp_path / "results.csv") == ROWS
    with (tmp_path / "results.csv").open("a") as file:
        file.write("2,1,")
    assert read_rows(tmp_path / "results.csv") == ROWS


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("cfg1-cp1: one rank does\n  rank : 0\n  exitcode  : -9 (pid: 3)\n", "a rank was killed by signal 9"),
        ("E1124 torch\nlost rank 1: of 2 ([/root/x.cc:5] closed)\n exitcode  : -9", "lost rank 1: of 2"),
        ("Traceback (most recent call last):\n  File x\nValueError: no\n", "ValueError: no"),
        ("", "exit code 1"),
    ],
)
def test_a_failure_has_its_reason(printed, reason, tmp_path):
    assert _reason(1, printed, tmp_path, 60) == reason


def test_a_killed_sweep_leaves_no_ranks_behind(tmp_path):
    flags = [f"--out={tmp_path / 'sweep'}", "--world-sizes", "1", "--frames", "8", "--steps", "20000"]
    process = subprocess.Popen([sys.executable, str(EXPERIMENTS / "sweep.py"), *flags], stdout=subprocess.DEVNULL)

    def ranks() -> int:
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return sum(f"{tmp_path}/sweep/.clips".encode() in command for command in commands)

    wait_until(lambda: ranks() > 1)  # torchrun, and a rank
    process.kill()
    process.wait()
    wait_until(lambda: ranks() == 0)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_sweep_records_failures_goes_on_and_is_logged(tmp_path):
    out = tmp_path / "sweep"
    config = Config(**TINY, world_sizes=(2,), layouts="auto", out=out)
    assert main(replace(config, timeout=1)) == 1
    (failed,) = read_rows(out / "results.csv")
    assert (failed.status, failed.error) == ("failed", "took longer than --timeout 1 seconds")
    assert main(replace(config, world_sizes=(1, 2), resume=True)) == 0
    first = read_rows(out / "results.csv")
    assert [(r.world_size, r.cfg, r.status) for r in first] == [(1, 1, "ok"), (2, 2, "ok")]
    assert first[1].cfg_all_gather_bytes == 2 * (4 * 4 * 4 * 128) * 4  # steps, tokens x channels, float32
    assert main(replace(config, world_sizes=(1, 2), resume=True, wandb="disabled")) == 0
    assert read_rows(out / "results.csv") == first  # nothing was measured again
    names = {"results.csv", "sweep.json", "tables.md", "wandb", *(f"{name}.png" for name in sweep_report.PLOTS)}
    assert {p.name for p in out.iterdir()} == names
    logged = [read_log(path) for path in sorted((out / "wandb").glob("offline-run-*/*.wandb"))]
    assert [log.config["world_size"] for log in logged] == [1, 2]
    sweep_report.log_to_wandb(first, out, "offline", "meshdiff")
    assert len(list((out / "wandb").glob("offline-run-*"))) == 2  # nothing is logged twice
    for log, measured in zip(logged, first, strict=True):
        assert log.group == "sweep"
        assert log.name == str(measured.cell)
        assert log.summary["seconds_per_step"] == measured.seconds_per_step
        assert log.summary["speed_up"] > 0
        assert log.history["seconds_per_step"] == [measured.seconds_per_step]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_sizes": (64,)}, "--world-sizes: 64 ranks would share"),
        ({"world_sizes": (0,)}, "--world-sizes: (0,) given"),
        ({"frames": ()}, "--frames: needs at least one"),
        ({"repeats": 0}, "--repeats: 0 given"),
        ({"run_flags": '--dim "'}, "--run-flags: "),
        ({"run_flags": "--stepz 3"}, None),
        ({"run_flags": "--steps 3"}, "--run-flags: --steps is not among those"),
        ({"run_flags": "--threads 8", "world_sizes": (2,)}, "--world-sizes: 2 ranks would share"),
        ({"height": 0}, "--height: 0 given"),
        ({"width": 33}, "--width: 33 given, needs a multiple of 8"),
        ({"model": "wan"}, "--checkpoint: is missing"),
        ({"resume": True, "out": None}, "--resume: goes on with a sweep"),
        ({"frames": (2,), "height": 16, "width": 16, "layouts": "auto", "world_sizes": (16,)}, "--world-sizes: "),
    ],
)
def test_bad_flags_are_one_error_and_leave_nothing(changes, message, tmp_path):
    with pytest.raises(InputError, match=message and f"^{message[:12]}") as raised:
        main(replace(Config(out=tmp_path / "sweep"), **changes))
    assert message is None or str(raised.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_goes_on_only_with_the_clips_that_it_has(tmp_path):
    out = tmp_path / "sweep"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    config = Config(**TINY, world_sizes=(1,), out=out)
    with pytest.raises(InputError, match="holds what is no sweep"):
        main(config)
    (out / "notes.txt").unlink()
    (out / "sweep.json").write_text(json.dumps(config.same_for_all() | {"steps": 9}))
    with pytest.raises(InputError, match="holds a sweep already"):
        main(config)
    with pytest.raises(InputError, match=r"--steps: the sweep in .* has 9, and this is 2"):
        main(replace(config, resume=True))
    (out / "sweep.json").write_text(json.dumps(config.same_for_all() | {"machine": "another"}))
    with pytest.raises(InputError, match=r"--resume: the sweep in .* has 'another'"):
        main(replace(config, resume=True))
    (out / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"--out: .*sweep.json cannot be read"):
        main(replace(config, resume=True))


def test_the_wandb_sweep_is_valid_and_its_command_runs(tmp_path):
    # These two take seconds, which nothing else of the suite needs.
    from sweeps import SweepConfig, next_runs
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    described = yaml.safe_load((EXPERIMENTS / "sweep.yaml").read_text())
    runs = [run.config for run in next_runs(SweepConfig(described), [], n=20) if run is not None]
    assert len({json.dumps(config, sort_keys=True) for config in runs}) == 12
    small = {"wandb": {"value": "offline"}, "height": {"value": 32}, "width": {"value": 32}, "cfg": {"value": 1}}
    given = create_sweep_command_args({"args": {**runs[-1], **small}})["args"]
    macros = {"${env}": [], "${program}": [str(EXPERIMENTS / "run.py")], "${args}": given}
    command = [word for part in create_sweep_command(described["command"]) for word in macros.get(part, [part])]
    command = [word.replace("auto", "2") if word == "auto" else word for word in command]
    command += ["--dim=48", "--depth=1", "--heads=4", f"--out={tmp_path / 'run'}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    log = read_log(path)
    assert log.config["layout"] == {"dp": 1, "cfg": 1, "cp": 2}
    assert log.summary[described["metric"]["name"]] > 0
