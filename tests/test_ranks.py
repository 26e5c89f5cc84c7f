"""The ranks that tests fork: processes of their own, of which none is left, and a check fails if one of them does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ENVIRONMENT, run_on_every_rank, run_on_ranks, start_on_ranks

BROKEN = 1


def alike() -> tuple:
    """What ranks have in common, and what each has for itself."""
    total = torch.full((3,), float(dist.get_rank()))
    dist.all_reduce(total)
    order = [*{f"name {i}" for i in range(20)}]
    return total, os.getpid(), os.environ["RANK"], torch.rand(2), order, os.environ.get("MESHDIFF_SEEN")


def test_ranks_are_processes_of_their_own_in_one_world(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHDIFF_SEEN", "yes")
    ranks = [run_on_every_rank(alike, 4, tmp_path) for _ in range(2)]
    for of_all in ranks:
        totals, processes, numbers, drawn, orders, seen = zip(*of_all, strict=True)
        assert [total.tolist() for total in totals] == [[6.0] * 3] * 4
        assert len({*processes, os.getpid()}) == 5
        assert numbers == ("0", "1", "2", "3")
        assert len({tuple(own.tolist()) for own in drawn}) == 4  # as of processes that were started one by one
        assert orders[0] == orders[2] != orders[1] == orders[3]  # hashes of strings are not those of the neighbour
        assert set(seen) == {"yes"}
    assert len({process for of_all in ranks for _, process, *_ in of_all}) == 8


def raises() -> None:
    if dist.get_rank() == BROKEN:
        raise KeyError("broken on purpose")
    dist.barrier()


def exits() -> None:
    if dist.get_rank() == BROKEN:
        sys.exit(3)
    dist.barrier()


def is_killed() -> None:
    if dist.get_rank() == BROKEN:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.parametrize(("check", "code"), [(raises, 1), (exits, 3), (is_killed, -9)])
def test_one_rank_that_fails_ends_all_and_says_why(check, code, tmp_path):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=f"{check.__name__}: exit codes") as failure:
        run_on_ranks(check, 3, tmp_path)
    assert time.monotonic() - began < 60  # no rank waited for it as long as a collective does
    assert f", {code}, " in str(failure.value)
    assert ("[rank1]: KeyError: 'broken on purpose'" in str(failure.value)) == (check is raises)


def hangs(told: Path) -> None:
    """One rank never ends, nor does what it has started; says which processes these are, and the one that forked it."""
    if dist.get_rank() == BROKEN:
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        told.with_suffix(".partial").write_text(f"{os.getpid()} {started.pid} {os.getppid()}")
        told.with_suffix(".partial").rename(told)
        time.sleep(600)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_that_take_too_long_are_killed_with_all_that_they_started(tmp_path):
    ended = start_on_ranks(hangs, 2, tmp_path, tmp_path / "told", timeout=4)
    assert ended.timed_out
    assert ended.exit_codes == [0, -9]
    rank, started, _ = map(int, (tmp_path / "told").read_text().split())
    wait_until(lambda: not any(map(is_running, (rank, started))))
    assert run_on_every_rank(number, 2, tmp_path) == [0, 1]  # others can be forked still


def number() -> int:
    return dist.get_rank()


TEST = """
from pathlib import Path

from ranks import run_on_ranks
from tests.test_ranks import hangs

def test_that_hangs(tmp_path):
    run_on_ranks(hangs, 2, tmp_path, Path("told").resolve())
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_the_tests(stop, tmp_path):
    (tmp_path / "test_that_hangs.py").write_text(TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir=.",
        "--basetemp=temp",
    ]
    tests = subprocess.Popen(
        [*command, "test_that_hangs.py"],
        env={**os.environ, **ENVIRONMENT},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until((tmp_path / "told").exists)
    tests.send_signal(stop)
    tests.wait(timeout=60)
    wait_until(lambda: not any(map(is_running, map(int, (tmp_path / "told").read_text().split()))))


def other_bits() -> torch.Tensor:
    """The sum over ranks, of which one computes another number."""
    own = torch.ones(3) * (1.01 if dist.get_rank() == BROKEN else 1)
    dist.all_reduce(own)
    return own


def test_what_one_rank_computes_wrongly_is_in_the_result(tmp_path):
    assert not torch.equal(run_on_ranks(other_bits, 2, tmp_path), torch.full((3,), 2.0))
