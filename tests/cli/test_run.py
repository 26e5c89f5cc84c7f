"""The command a person types, as a person types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from clips import FLAGS, video
from ranks import run_command
from wandb_log import read_log

from meshdiff.cli.run import main


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    assert main([*FLAGS, "--out", str(out)]) == 0
    return out


def test_a_run_writes_everything_it_promises(one_process):
    names = {"video.mp4", "video.gif", "contact_sheet.png", "video.safetensors", "metrics.json"}
    assert {p.name for p in one_process.iterdir()} == names
    assert video(one_process).shape == (8, 1, 32, 32)
    assert video(one_process).dtype == torch.float32
    assert video(one_process).abs().max() <= 1
    metrics = json.loads((one_process / "metrics.json").read_text())
    assert metrics["layout"] == {"dp": 1, "cfg": 1, "cp": 1}
    assert metrics["world_size"] == 1
    assert metrics["prompt"] == "a 7 moving left"
    assert metrics["seed"] == 0
    assert metrics["steps"] == 2
    assert metrics["guidance_scale"] == 4.0
    assert len(metrics["seconds_per_step"]) == 2
    assert metrics["seconds_total"] > sum(metrics["seconds_per_step"]) * 0.99
    (phases,), (peaks,) = metrics["seconds_by_phase"], metrics["peak_memory_by_phase"]
    assert phases.keys() == peaks.keys() == {"load", "encode", "sample", "decode", "write", "other"}
    between = sum(phases.values()) - phases["load"] - phases["write"]
    assert between == pytest.approx(metrics["seconds_total"])
    assert phases["sample"] >= sum(metrics["seconds_per_step"]) * 0.99
    assert phases["load"] > 0.001
    assert phases["write"] > 0.001
    assert max(peaks.values()) >= metrics["peak_memory_bytes"][0]
    assert len(metrics["peak_memory_bytes"]) == len(metrics["start_memory_bytes"]) == 1
    assert 2**20 < metrics["start_memory_bytes"][0] <= metrics["peak_memory_bytes"][0] < 2**33
    assert metrics["comms"] == {}
    assert metrics["torch_version"] == torch.__version__
    assert metrics["meshdiff_version"]
    assert metrics["device"]


def test_a_model_of_any_size_can_be_drawn(tmp_path):
    shape = ("--model", "random", "--dim", "48", "--depth", "1", "--heads", "4", "--width", "64")
    assert main([*FLAGS, *shape, "--out", str(tmp_path / "run")]) == 0
    assert video(tmp_path / "run").shape == (8, 1, 32, 64)


def test_simulated_ranks_give_the_same_clip(one_process, tmp_path):
    assert main([*FLAGS, "--simulate", "--cp", "4", "--cfg", "2", "--out", str(tmp_path / "run")]) == 0
    assert torch.equal(video(tmp_path / "run"), video(one_process))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["simulated"]
    assert metrics["world_size"] == 8


BAD = [
    ("--depth", "0"),
    ("--heads", "7"),
    ("--prompt", "a 7 moving sideways"),
    ("--prompt", "an eleven moving left"),
    ("--prompt", ""),
    ("--prompt", "..."),
    ("--negative-prompt", "blurry"),
    ("--frames", "0"),
    ("--height", "-8"),
    ("--width", "33"),
    ("--steps", "0"),
    ("--cp", "0"),
    ("--cfg", "0"),
    ("--cfg", "3"),
    ("--threads", "0"),
    ("--cp", "200"),
    ("--weights", "no-such-file"),
    ("--weights", __file__),
    ("--out", os.path.join(__file__, "run")),
    ("--guidance-scale", "inf"),
    ("--out", "x" * 300),
]


@pytest.mark.parametrize(("flag", "value"), BAD, ids=lambda text: Path(text).name)
def test_bad_input_is_one_line_that_names_the_flag(flag, value, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["--wandb", "disabled", f"{flag}={value}"]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith(flag)
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_that_cannot_be_read_are_tyros_own_error(capfd):
    assert main(["--stepz", "3"]) == 2
    assert "--stepz" in capfd.readouterr().err
    assert main(["--help"]) == 0
    assert "Guidance parallelism" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a 7 moving sideways"], "--prompt: unknown word 'sideways'"),
        (["--cp", "4", "--cfg", "2"], "start it with: torchrun --nproc-per-node 8 "),
        (["--stepz", "3"], "--stepz"),
    ],
)
def test_bad_input_ends_every_rank(flags, message, tmp_path):
    (tmp_path / "here").mkdir()
    ranks = run_command(flags, 2, tmp_path, timeout=60, cwd=tmp_path / "here")
    assert ranks.exit_codes == [2, 2], ranks
    assert "".join(ranks.stderr).count(message) == 1
    assert all(message in report for report in ranks.reports), ranks.reports
    assert "[rank" not in "".join(ranks.stderr)  # how torch marks a rank's traceback
    assert list((tmp_path / "here").iterdir()) == []


def test_wandb_logs_offline_what_the_metrics_say(tmp_path):
    out = tmp_path / "run"
    assert main(["--frames", "8", "--steps", "2", "--out", str(out)]) == 0
    (path,) = (out / "wandb").glob("offline-run-*/*.wandb")
    log, metrics = read_log(path), json.loads((out / "metrics.json").read_text())
    assert log.summary["seconds_total"] == metrics["seconds_total"]
    assert log.summary["seconds_by_phase/sample/rank0"] == metrics["seconds_by_phase"][0]["sample"]
    assert log.summary["peak_memory_by_phase/load/rank0"] == metrics["peak_memory_by_phase"][0]["load"]
    assert "video" in {key.split("/")[0] for key in log.summary}
    assert log.config["prompt"] == "a 7 moving left"
    assert len(log.history["seconds_per_step"]) == 2
