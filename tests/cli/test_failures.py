"""Whatever is gone when a run fails: every rank ends with code 2 and one line, which torchrun's report repeats."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from clips import FLAGS, SCRIPT
from ranks import free_port, run_command

from meshdiff.cli import generate, prompt_list
from meshdiff.cli.run import main
from meshdiff.distributed import heartbeat as liveness
from meshdiff.distributed import world
from meshdiff.errors import InputError


def test_ranks_that_cannot_start_say_why_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth-none")
    ranks = run_command([*FLAGS, "--out", str(tmp_path / "out" / "run")], 2, tmp_path, timeout=90)
    errors = "".join(ranks.stderr)
    said = [line for line in errors.splitlines() if line.startswith("cannot start: rank ")]
    assert len(said) == 1, errors
    assert "Unable to find address for: eth-none" in said[0]
    assert "GLOO_SOCKET_IFNAME, now eth-none, must name a network interface" in said[0]
    assert ranks.exit_codes == [2, 2]
    assert ranks.reports == [said[0], said[0]]
    assert "[rank" not in errors
    assert not (tmp_path / "out").exists()


def test_one_process_that_cannot_start_says_why(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth-none"}
    command = [sys.executable, SCRIPT, *FLAGS, "--out", str(tmp_path / "run")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    error = "cannot start: Unable to find address for: eth-none; GLOO_SOCKET_IFNAME, now eth-none, is to name a network"
    assert process.stderr.startswith(error)
    assert process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def as_rank(monkeypatch):
    """Lets this process be a rank of two, whose handling of signals is not to stay."""

    def be(**environment: str) -> None:
        everything = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        for name, value in (everything | environment).items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return be


def test_a_rank_that_nobody_answers_says_so_in_time(as_rank, tmp_path, capfd):
    port = free_port()
    as_rank(MASTER_PORT=str(port))
    assert main([*FLAGS, "--timeout", "1", "--out", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"cannot start: rank 1 of 2 did not meet the others at localhost:{port}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("WORLD_SIZE", "x", "'x' in the environment is no number"),
        ("RANK", "x", "'x' in the environment is no number"),
        ("RANK", "2", "2 given, needs to be below WORLD_SIZE, which is 2"),
        ("MASTER_PORT", "x", "'x' in the environment is no number"),
    ],
)
def test_a_wrong_environment_is_one_line(name, value, problem, as_rank, capfd):
    as_rank(**{name: value})
    assert main([*FLAGS]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"{name}: {problem}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("noticed_by", ["a beat", "a question"])
def test_a_store_that_is_gone_is_no_error_of_its_own(noticed_by, monkeypatch):
    class Gone:
        def __getattr__(self, name):
            raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(liveness, "store", Gone)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    heartbeats = liveness.Heartbeats(interval=0.01 if noticed_by == "a beat" else 1)
    heartbeats._thread.start()
    if noticed_by == "a beat":
        heartbeats._thread.join(timeout=10)
    assert heartbeats.missing() is None
    heartbeats.stop()
    assert not heartbeats._thread.is_alive()


def test_a_restart_takes_up_the_folder_of_the_attempt_before(tmp_path, monkeypatch, capfd):
    """As if torchrun's store told of it."""
    kept: dict[str, str] = {}
    for module in (generate, prompt_list):
        monkeypatch.setattr(module, "remember", kept.__setitem__)
        monkeypatch.setattr(module, "recall", kept.get)
    flags = [*FLAGS, "--out", str(tmp_path / "run")]
    (tmp_path / ".run.partial-1234").mkdir()  # of a first rank that was killed
    kept["out"] = str(tmp_path / "run")
    assert main(flags) == 0
    made = (tmp_path / "run" / "metrics.json").stat().st_mtime_ns
    assert main(flags) == 0  # the first rank was killed when all was written
    assert "run is complete" in " ".join(capfd.readouterr().out.split())
    assert (tmp_path / "run" / "metrics.json").stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    kept.clear()
    assert main(flags) == 2  # another run does not take it for its own
    assert kept == {}
    (tmp_path / "list.txt").write_text("a 1\na 2\n")
    of_list = [*FLAGS, "--prompts", "-", "--out", str(tmp_path / "list")]
    with (tmp_path / "list.txt").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(of_list) == 0
        assert kept == {"out": str(tmp_path / "list"), "list": "a 1\na 2\n"}
        assert main(of_list) == 0  # nothing more can be read
    assert "2 of 2 are complete" in capfd.readouterr().out


def test_each_attempt_has_a_store_of_its_own_without_counting_restarts():
    run, second = dist.HashStore(), timedelta(seconds=20)

    def attempt(name: str, order: list[int]) -> None:
        """Every rank writes what no other attempt is to read; the first to come waits for the others."""
        stores: dict[int, dist.Store] = {}

        def join(rank: int) -> None:
            stores[rank] = world._store_of_attempt(run, rank, 3, second)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join()
        assert sorted(stores) == [0, 1, 2]
        assert not any(store.check(["key"]) for store in stores.values())
        stores[1].set("key", name)
        assert {store.get("key") for store in stores.values()} == {name.encode()}

    attempt("first", [0, 1, 2])
    attempt("second", [1, 2, 0])  # those that are early find what rank 0 left in the first
    attempt("third", [2, 0, 1])


def test_ranks_that_do_not_come_are_named():
    with pytest.raises(dist.DistStoreError, match="ranks 1, 2 did not come within"):
        world._store_of_attempt(dist.HashStore(), 0, 3, timedelta(seconds=0.2))
    with pytest.raises(dist.DistStoreError, match="rank 0 did not come within"):
        world._store_of_attempt(dist.HashStore(), 1, 3, timedelta(seconds=0.2))


def test_the_line_of_the_first_rank_to_fail_is_that_of_all(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(world, "_stores", {"attempt": store})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert world.first_failure("out of memory: \udcc3") == (True, "out of memory: \\udcc3")
    monkeypatch.setenv("RANK", "0")
    assert world.first_failure("lost rank 1") == (False, "out of memory: \\udcc3")
    monkeypatch.setattr(world, "_stores", {})
    assert world.first_failure("lost the launcher") == (True, "lost the launcher")


def test_input_errors_of_all_ranks_are_told_from_those_of_one():
    from meshdiff.distributed.consensus import agreed

    with pytest.raises(InputError) as caught, agreed():
        raise InputError("--prompt", "is empty")
    assert caught.value.everywhere
    assert not InputError("--prompt", "is empty").everywhere
