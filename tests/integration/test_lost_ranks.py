"""Runs of which a rank, the launcher or everything is killed: one line says why, and a run goes on where it was."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import on_ranks
import pytest
import torch
import torch.distributed as dist
from clips import FAILED, FLAGS, NAMES, SCRIPT, clips, list_alone, records, video
from ranks import SUPPORT, free_port, run_command, start_on_ranks, torchrun

from meshdiff.cli.run import main
from meshdiff.models.video_dit import VideoDiT


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return list_alone(tmp_path_factory.mktemp("alone"))


def in_second_step(do: Callable[[], None]) -> None:
    """Let this process do that before its model runs for the second time."""
    forward, calls = VideoDiT.forward, []

    def counted(*args):
        calls.append(1)
        if len(calls) == 2:
            do()
        return forward(*args)

    VideoDiT.forward = counted


def runs_out_of_memory(flags: list[str]) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    if os.environ["RANK"] == "1":
        in_second_step(fail)
    on_ranks.command(flags)


def test_a_rank_that_runs_out_of_memory_ends_all_with_one_line(tmp_path):
    flags = [*FLAGS, "--cp", "2", "--out", str(tmp_path / "out" / "run")]
    ranks = start_on_ranks(runs_out_of_memory, 2, tmp_path, flags, world=False, timeout=90)
    assert all(ranks.exit_codes), ranks
    said = "".join(ranks.stderr)
    lines = [line for line in said.splitlines() if "out of memory" in line or "lost " in line]
    assert len(lines) == 1
    start = "out of memory: on rank 1 (CUDA out of memory. Tried to allocate 20.00 GiB.); more ranks"
    assert lines[0].startswith(start)
    assert ranks.reports[1].startswith(start)
    assert not any("lost " in report for report in ranks.reports)
    assert "[rank" not in said
    assert not (tmp_path / "out").exists()


def hangs(flags: list[str]) -> None:
    if os.environ["RANK"] == "0":
        in_second_step(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    on_ranks.command(flags)


@pytest.mark.serial
def test_a_rank_that_hangs_is_named_with_the_collective(tmp_path):
    flags = [*FLAGS, "--cp", "2", "--cfg", "1", "--timeout", "5", "--out", str(tmp_path / "run")]
    ranks = start_on_ranks(hangs, 2, tmp_path, flags, world=False, timeout=60)
    assert ranks.exit_codes[0] == -signal.SIGKILL, ranks  # it hung until it was killed
    said = [line for line in "".join(ranks.stderr).splitlines() if line.startswith("lost rank")]
    assert len(said) == 1, ranks
    assert re.match(f"lost rank 0: {waited_for(0)}", said[0])
    assert "[rank" not in "".join(ranks.stderr)


def waited_for(lost: int) -> str:
    """How the other of two ranks says that it waited, as a pattern."""
    return rf"rank {1 - lost} waited in (all_to_all|all_gather) on cp for one that was killed, or hangs"


@pytest.mark.serial
def test_a_rank_that_is_killed_is_named_with_the_collective(tmp_path):
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
    os.kill(process_of_rank(1, str(tmp_path / "run")), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while "lost rank" not in errors.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    run.wait(timeout=30)
    said = [line for line in errors.read_text().splitlines() if line.startswith("lost rank")]
    assert len(said) == 1, errors.read_text()
    ended = "the launcher ended rank 0 because of one that was killed, or hangs"  # it may notice first
    assert re.match(rf"lost rank 1: ({waited_for(1)}|{ended})", said[0])
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


def by_hand_with_own_seed(flags: list[str], port: int) -> None:
    """Without a launcher, rank 0 is where ranks meet."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    os.environ["MASTER_PORT"] = str(port)
    on_ranks.command([*flags, "--seed", str(1 + int(os.environ["RANK"]))])


def test_ranks_started_with_different_flags_stop_at_once(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    ranks = start_on_ranks(by_hand_with_own_seed, 2, tmp_path, [*FLAGS], free_port(), world=False, cwd=here, timeout=60)
    assert ranks.exit_codes == [2, 2], ranks
    assert ranks.stderr[0].strip().endswith("--seed: is 1 on rank 0 and 2 on rank 1; start every rank with the same")
    assert list(here.iterdir()) == []


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


def killed_after_a_clip(flags: list[str], out: Path) -> None:
    def watch() -> None:
        while not list(out.glob("*/metrics.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    on_ranks.command(flags)


@pytest.mark.parametrize("whom", ["a rank", "everybody"])
def test_a_killed_run_goes_on_where_it_was(whom, alone, tmp_path):
    out = tmp_path / "out"
    flags = [*FLAGS, "--prompts", str(alone / "list.txt"), "--out", str(out), "--resume"]
    if whom == "everybody":
        ranks = start_on_ranks(killed_after_a_clip, 2, tmp_path, flags, out, world=False, timeout=60)
        assert -signal.SIGKILL in ranks.exit_codes, ranks
    else:
        kill_a_rank_after_a_clip(flags, out)
    assert run_command(flags, 2, tmp_path).exit_codes == [1, 1]
    expected, found = clips(alone / "out"), clips(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert records(out).keys() == {*NAMES, *FAILED}
    assert not list(out.glob(".*"))


def kill_a_rank_after_a_clip(flags: list[str], out: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([*launcher, SCRIPT, *flags], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(out.glob("*/metrics.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(ranks_of(str(out))[-1], signal.SIGKILL)
    run.communicate(timeout=60)


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
