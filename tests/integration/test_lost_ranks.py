"""Runs of which a rank, the launcher or everything is killed: one line says why, and a run goes on where it was."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from clips import FAILED, FLAGS, NAMES, SCRIPT, clips, list_alone, records, video
from ranks import SUPPORT, free_port, run_command, torchrun

from meshdiff.cli.run import main


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return list_alone(tmp_path_factory.mktemp("alone"))


def test_a_rank_that_runs_out_of_memory_ends_all_with_one_line(tmp_path):
    program = str(SUPPORT / "one_rank_fails.py")
    process = torchrun(2, program, *FLAGS, "--cp", "2", "--out", str(tmp_path / "run"), timeout=90)
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


@pytest.mark.serial
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
            [sys.executable, SCRIPT, *FLAGS, *flags], env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True
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


def start_rank(rank: int, port: int, *flags: str, **environment: str) -> subprocess.Popen:
    """One of two ranks, by hand."""
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    env |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, SCRIPT, *flags], env=env, stderr=subprocess.PIPE, text=True)


def test_ranks_whose_launcher_is_killed_end_with_a_line_each(tmp_path):
    (tmp_path / "list.txt").write_text("a 1\na 2\n")
    out = tmp_path / "out"
    launcher = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # what ranks need of torchrun
    flags = [*FLAGS, "--steps", "5000", "--prompts", str(tmp_path / "list.txt"), "--out", str(out)]
    ranks = [start_rank(rank, launcher.port, *flags, TORCHELASTIC_USE_AGENT_STORE="True") for rank in range(2)]
    deadline = time.monotonic() + 60
    while len(list(out.glob(".*partial*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    del launcher
    try:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    for rank, error in enumerate(errors):
        assert error.startswith(f"lost the launcher: rank {rank} cannot reach the store at localhost:")
        assert error.count("\n") == 1
    assert not list(out.glob(".*"))


def test_a_run_that_torchrun_restarts_makes_the_same_clip(tmp_path):
    assert main([*FLAGS, "--out", str(tmp_path / "one")]) == 0
    program = str(SUPPORT / "killed_once.py")
    process = torchrun(2, program, *FLAGS, "--cp", "2", "--out", str(tmp_path / "run"), restarts=1, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "exitcode: -9" in process.stderr
    assert torch.equal(video(tmp_path / "run"), video(tmp_path / "one"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "run"]


@pytest.mark.parametrize("whom", ["a rank", "everybody"])
def test_a_killed_run_goes_on_where_it_was(whom, alone, tmp_path):
    out = tmp_path / "out"
    flags = [*FLAGS, "--prompts", str(alone / "list.txt"), "--out", str(out), "--resume"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([*launcher, SCRIPT, *flags], env=environment, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(out.glob("*/metrics.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    if whom == "everybody":
        os.killpg(run.pid, signal.SIGKILL)
        for rank in ranks_of(str(out)):
            os.kill(rank, signal.SIGKILL)
    else:
        os.kill(ranks_of(str(out))[-1], signal.SIGKILL)
    run.communicate(timeout=60)
    assert run_command(flags, 2, tmp_path).exit_codes == [1, 1]
    expected, found = clips(alone / "out"), clips(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert records(out).keys() == {*NAMES, *FAILED}
    assert not list(out.glob(".*"))


def ranks_of(word: str) -> list[int]:
    """Processes that run the script itself with that among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if word in arguments and SCRIPT in arguments[:3]:
            found.append(int(process.name))
    return sorted(found)
