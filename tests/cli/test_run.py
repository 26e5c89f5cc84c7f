"""The command a person types, as a person types it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import EXPERIMENTS, SUPPORT, free_port, run_command, torchrun
from safetensors.torch import load_file
from wandb_log import read_log

from meshdiff.cli.run import main

SCRIPT = str(EXPERIMENTS / "run.py")
SMALL = ("--frames", "8", "--steps", "2", "--wandb", "disabled")


def video(folder) -> torch.Tensor:
    return load_file(folder / "video.safetensors")["video"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    assert main([*SMALL, "--out", str(out)]) == 0
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
    assert len(metrics["peak_memory_bytes"]) == len(metrics["start_memory_bytes"]) == 1
    assert 2**20 < metrics["start_memory_bytes"][0] <= metrics["peak_memory_bytes"][0] < 2**33
    assert metrics["comms"] == {}
    assert metrics["torch_version"] == torch.__version__
    assert metrics["meshdiff_version"]
    assert metrics["device"]


def test_a_model_of_any_size_can_be_drawn(tmp_path):
    shape = ("--model", "random", "--dim", "48", "--depth", "1", "--heads", "4", "--width", "64")
    assert main([*SMALL, *shape, "--out", str(tmp_path / "run")]) == 0
    assert video(tmp_path / "run").shape == (8, 1, 32, 64)


def test_torchrun_turns_guidance_parallelism_on_and_gives_the_same_clip(one_process, tmp_path):
    process = torchrun(2, SCRIPT, *SMALL, "--out", str(tmp_path / "run"))
    assert process.returncode == 0, process.stderr
    assert torch.equal(video(tmp_path / "run"), video(one_process))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["layout"] == {"dp": 1, "cfg": 2, "cp": 1}
    assert len(metrics["peak_memory_bytes"]) == 2
    assert metrics["comms"]["cfg"]["all_gather"]["count"] == 2
    assert process.stdout.count("a 7 moving left") == 1  # only rank 0 talks


def test_two_nodes_give_the_same_clip(one_process, tmp_path):
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-id", "test", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command = [*launcher, *meeting, "--local-addr", "localhost", SCRIPT, *SMALL, "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert torch.equal(video(tmp_path / "run"), video(one_process))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["layout"] == {"dp": 1, "cfg": 2, "cp": 1}


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_one_process_starts_the_ranks_that_its_layout_needs(launcher, one_process, tmp_path):
    flags = [*SMALL, "--cp", "2", "--cfg", "2", "--out", str(tmp_path / "run")]
    if launcher == "torchrun":
        process = torchrun(1, SCRIPT, *flags)
    else:
        process = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    command = shlex.join(["torchrun", "--nproc-per-node", "4", os.path.relpath(SCRIPT), *flags])
    assert f"starting 4 ranks on this machine, as would: {command}" in process.stdout
    assert torch.equal(video(tmp_path / "run"), video(one_process))


def test_simulated_ranks_give_the_same_clip(one_process, tmp_path):
    assert main([*SMALL, "--simulate", "--cp", "4", "--cfg", "2", "--out", str(tmp_path / "run")]) == 0
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


def test_a_rank_that_runs_out_of_memory_ends_all_with_one_line(tmp_path):
    program = str(SUPPORT / "one_rank_fails.py")
    process = torchrun(2, program, *SMALL, "--cp", "2", "--out", str(tmp_path / "run"), timeout=90)
    assert process.returncode != 0
    said, _, report = process.stderr.partition("FAILED")
    lines = [line for line in said.splitlines() if "out of memory" in line or "lost " in line]
    assert len(lines) == 1
    start = "out of memory: on rank 1 (CUDA out of memory. Tried to allocate 20.00 GiB.); more ranks"
    assert lines[0].startswith(start)
    assert f"traceback : {start}" in report
    assert "lost " not in report
    assert "[rank" not in process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stop", "lost"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)], ids=["killed", "hangs"])
def test_a_rank_that_is_lost_is_named_with_the_collective(stop, lost, tmp_path):
    flags = ["--steps", "5000", "--wandb", "disabled", "--cp", "2", "--cfg", "1", "--timeout", "5"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    errors = tmp_path.with_suffix(".errors")
    with errors.open("w") as file:
        run = subprocess.Popen(
            [*launcher, SCRIPT, *flags, "--out", str(tmp_path / "run")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=file,
        )
    while not any(tmp_path.iterdir()):
        time.sleep(0.2)
    time.sleep(3)  # to be somewhere in the middle of it
    lost_process = process_of_rank(lost, str(tmp_path / "run"))
    os.kill(lost_process, stop)
    deadline = time.monotonic() + 30
    while "lost rank" not in errors.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):  # the launcher gives one that hangs 30 seconds more
        os.kill(lost_process, signal.SIGKILL)
    run.wait(timeout=30)
    said = [line for line in errors.read_text().splitlines() if line.startswith("lost rank")]
    assert len(said) == 1, errors.read_text()
    waited = rf"rank {1 - lost} waited in (all_to_all|all_gather) on cp for one that was killed, or hangs"
    ended = rf"the launcher ended rank {1 - lost} because of one that was killed, or hangs"  # it may notice first
    assert re.match(rf"lost rank {lost}: ({waited}|{ended})", said[0])
    assert "[rank" not in errors.read_text()


def process_of_rank(rank: int, argument: str) -> int:
    """The process that runs the script as that rank, with that among its arguments."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_text().split("\0")
            environment = (process / "environ").read_text().split("\0")
            if argument in arguments and f"RANK={rank}" in environment:
                return int(process.name)
    raise AssertionError(f"no process is rank {rank}")


def test_ranks_started_with_different_flags_stop_at_once(tmp_path):
    port = free_port()

    def start(rank: int, *flags: str) -> subprocess.Popen:
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, SCRIPT, *SMALL, *flags], env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )

    ranks = [start(0, "--seed", "1"), start(1, "--seed", "2")]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert errors[0].strip().endswith("--seed: is 1 on rank 0 and 2 on rank 1; start every rank with the same")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_ranks_and_leaves_nothing(tmp_path):
    flags = ["--steps", "5000", "--wandb", "disabled", "--cfg", "2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, SCRIPT, *flags], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert any(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_wandb_logs_offline_what_the_metrics_say(tmp_path):
    out = tmp_path / "run"
    assert main(["--frames", "8", "--steps", "2", "--out", str(out)]) == 0
    (path,) = (out / "wandb").glob("offline-run-*/*.wandb")
    log, metrics = read_log(path), json.loads((out / "metrics.json").read_text())
    assert log.summary["seconds_total"] == metrics["seconds_total"]
    assert "video" in {key.split("/")[0] for key in log.summary}
    assert log.config["prompt"] == "a 7 moving left"
    assert len(log.history["seconds_per_step"]) == 2
