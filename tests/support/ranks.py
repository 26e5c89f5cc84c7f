"""Functions of tests on real gloo processes: forked from a server (`run_on_ranks`), or by a real torchrun."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import on_ranks
import torch
import torch.distributed as dist
from fork_server import Rank

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
SUPPORT = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])}
GRACE = 2.0
"""Seconds that the other ranks have to end by themselves when one has failed."""


def torchrun(
    world_size: int, *command: str, timeout: float = 300, cwd: Path | None = None, restarts: int = 0
) -> subprocess.CompletedProcess:
    """A real torchrun on this machine, one thread a rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    launcher += ["--max-restarts", str(restarts)]
    return subprocess.run(
        [*launcher, *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT},
    )


def free_port() -> int:
    """A port that no process of this machine listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_on_ranks(check: Callable, world_size: int, folder: Path, *arguments: Any, timeout: float = 300) -> Any:
    """Call a check on that many processes, none of which may fail; returns the result of rank 0.

    Args:
        check: a function of a module that can be imported.
        folder: for what the ranks print and return.
        arguments: of the function.
    """
    return run_on_every_rank(check, world_size, folder, *arguments, timeout=timeout)[0]


def run_on_every_rank(
    check: Callable, world_size: int, folder: Path, *arguments: Any, timeout: float = 300
) -> list[Any]:
    """Call a check like `run_on_ranks`; returns the results of all ranks."""
    ranks = start_on_ranks(check, world_size, folder, *arguments, timeout=timeout)
    assert not any(ranks.exit_codes), ranks
    return [torch.load(path, weights_only=False) for path in ranks.results]


@dataclass(frozen=True)
class Ended:
    """Ranks that have ended, and what each of them left.

    Attributes:
        check: the function that they called.
        exit_codes: -N is of a rank that signal N killed.
        reports: the reason why a rank failed, as torchrun's report would show it; "" if it gave none.
        results: files of what the function returned; of a rank that failed there is none.
        timed_out: whether they were killed because they took too long.
    """

    check: str
    exit_codes: list[int]
    stdout: list[str]
    stderr: list[str]
    reports: list[str]
    results: list[Path]
    timed_out: bool

    def __str__(self) -> str:
        lines = [f"{self.check}: exit codes {self.exit_codes}{', which took too long' * self.timed_out}"]
        for stream, printed in (("output", self.stdout), ("errors", self.stderr)):
            lines += [f"-- {stream} of rank {rank} --\n{text[-6000:]}" for rank, text in enumerate(printed) if text]
        return "\n".join(lines)


def start_on_ranks(
    check: Callable,
    world_size: int,
    folder: Path,
    *arguments: Any,
    timeout: float = 300,
    world: bool = True,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    imports: tuple[str, ...] = (),
) -> Ended:
    """Call a function on that many ranks and wait until all have ended, whatever came of them.

    When a rank fails, the others are killed soon after, as torchrun would;
    when the time is over, all are.

    Args:
        world: whether the ranks form a world before they call it.
        cwd: where they work; by default where this process does.
        environment: variables that they have and this process does not.
        imports: modules that ranks would import one by one, long after they have started.
    """
    name = f"{check.__module__}:{check.__qualname__}"
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # what ranks need of torchrun
    of_all = {**os.environ, **ENVIRONMENT, **(environment or {}), "WORLD_SIZE": str(world_size)}
    of_all |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "LOCAL_WORLD_SIZE": str(world_size)}
    of_all |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    of_all |= {"TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
    files = Path(tempfile.mkdtemp(prefix=f"{name.rpartition(':')[2]}-", dir=folder))
    for rank in range(world_size):
        own = of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        own |= {"TORCHELASTIC_ERROR_FILE": str(files / f"{rank}.report")}
        given = pickle.dumps(arguments)
        server(rank % 2).send(Rank(rank, name, imports, given, world, own, cwd or Path.cwd(), files / str(rank)))
    codes, timed_out = exit_codes(world_size, timeout)
    of_ranks = [files / str(rank) for rank in range(world_size)]
    return Ended(
        name,
        codes,
        stdout=[path.with_suffix(".out").read_text() for path in of_ranks],
        stderr=[path.with_suffix(".err").read_text() for path in of_ranks],
        reports=[report(path.with_suffix(".report")) for path in of_ranks],
        results=[path.with_suffix(".pt") for path in of_ranks],
        timed_out=timed_out,
    )


def run_command(flags: Sequence[str], world_size: int, folder: Path, **options: Any) -> Ended:
    """`meshdiff run` with these flags on that many ranks, as torchrun would start it; see `start_on_ranks`."""
    imports = ("meshdiff.integrations.diffusers_model",) if "diffusers" in flags else ()
    return start_on_ranks(on_ranks.command, world_size, folder, list(flags), world=False, imports=imports, **options)


def report(path: Path) -> str:
    """The message in the file in which a rank reports its failure to torchrun."""
    return json.loads(path.read_text())["message"]["message"] if path.exists() else ""


def exit_codes(world_size: int, timeout: float) -> tuple[list[int], bool]:
    """The exit codes of all ranks when all have ended, and whether that took too long."""
    codes, deadline, timed_out, told = dict[int, int](), time.monotonic() + timeout, False, False
    servers = [server(number) for number in range(min(2, world_size))]
    try:
        while len(codes) < world_size:
            left = max(0.0, deadline - time.monotonic())
            for ready in wait([one.connection for one in servers], None if told else left):
                rank, code = next(one for one in servers if one.connection is ready).receive()
                codes[rank] = code
                if code and not told:
                    deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() >= deadline and not told:
                timed_out, told = not any(codes.values()), True
                for one in servers:
                    one.send(None)
    except BaseException:  # Ctrl-C, say, after which nobody would wait for them
        server.cache_clear()
        for one in servers:
            one.close()
        raise
    return [codes[rank] for rank in range(world_size)], timed_out


class Server:
    """A process that forks ranks; see `fork_server.py`."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        program = f"import fork_server; fork_server.serve({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", program],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.printed,
            stderr=self.printed,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # Ctrl-C is for pytest, which ends this one
        )
        theirs.close()
        atexit.register(self.close)

    def send(self, message: Rank | None) -> None:
        self.connection.send(message)

    def receive(self) -> tuple[int, int]:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.printed.seek(0)
            raise RuntimeError(f"the server of ranks is gone:\n{self.printed.read()[-6000:]}") from None

    def close(self) -> None:
        """End it, and its ranks."""
        self.connection.close()
        self.process.wait(timeout=30)


@cache
def server(number: int) -> Server:
    """One of two servers, of even and of odd ranks.

    Ranks of one server have the same addresses and the same hashes of strings,
    so the same order of a set, which ranks that are started one by one do not.
    """
    return Server()
