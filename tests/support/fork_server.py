"""The process that ranks of tests are forked from: it has imported what they need, and nothing has run in it.

`ranks.py` starts it and sends it one `Rank` at a time. A rank is a process of its own, as torchrun would start it,
without the seconds that imports take. What does not survive a fork (threads, process groups) must not be here, so
modules with checks may define things when they are imported, and do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch._dynamo  # which every rank would import for itself, with its first DTensor
import torch.distributed as dist

from meshdiff.distributed.launch import end_process
from meshdiff.distributed.world import init_distributed


@dataclass(frozen=True)
class Rank:
    """One rank to fork.

    Attributes:
        number: its rank.
        check: the function that it calls, as "module:name".
        imports: modules that it needs besides, which the server imports once for all ranks.
        arguments: those of the function, pickled.
        world: whether the function is called in a world of all ranks, or forms one itself.
        environment: its environment variables, those of torchrun among them.
        cwd: its working directory.
        files: a path without a suffix, for what it prints (.out, .err) and returns (.pt).
    """

    number: int
    check: str
    imports: tuple[str, ...]
    arguments: bytes
    world: bool
    environment: dict[str, str]
    cwd: Path
    files: Path


def serve(descriptor: int) -> None:
    """Fork the ranks that are asked for, send (number, exit code) of each that ends; kill all when told to (None).

    Args:
        descriptor: a connection; when its other end is closed, ranks are killed and this function returns.
    """
    connection, running = Connection(descriptor), dict[int, int]()
    torch.set_num_threads(1)
    while True:
        try:
            asked = connection.recv() if connection.poll(0.005 if running else None) else ()
        except (EOFError, ConnectionResetError):
            kill(running)
            return
        if isinstance(asked, Rank):
            running[fork(asked)] = asked.number
        elif asked is None:
            kill(running)
        for process in [*running]:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                kill([process])  # what it started and left behind, as long as its number is not free for others
                exit_code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    connection.send((running.pop(process), exit_code))


def kill(processes: Any) -> None:
    """Kill these ranks and all that they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def fork(rank: Rank) -> int:
    """Start a rank; its process."""
    with contextlib.suppress(Exception):  # the rank will have the same error, and say so
        for module in (rank.check.partition(":")[0], *rank.imports):
            importlib.import_module(module)
    server, threads = os.getpid(), len(os.listdir("/proc/self/task"))
    gc.freeze()  # what is imported stays: no rank looks through it for garbage, which would copy its pages
    process = os.fork()
    if not process:
        become(rank, server, threads)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(process, process)  # the rank does it too: neither knows which of the two is first
    return process


def become(rank: Rank, server: int, threads: int) -> NoReturn:
    """Run a rank in this process, which was forked for it."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the server
    if os.getppid() != server:
        os._exit(1)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(rank.files.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(rank.environment)
    os.chdir(rank.cwd)
    torch.seed(), np.random.seed()  # by chance, as in a process that has just been started; `random` does it by itself
    try:
        if threads > 1:
            raise RuntimeError(f"importing {rank.check} started {threads - 1} threads, which forked ranks do not have")
        result = call(rank)
        torch.save(result, rank.files.with_suffix(".pt"))
    except SystemExit as stop:
        end_process(int(stop.code or 0))
    except BaseException:
        sys.excepthook(*sys.exc_info())  # torch's, which names the rank
        end_process(1)
    end_process(0)


def call(rank: Rank) -> Any:
    """Call the rank's function; returns its result."""
    module, _, name = rank.check.partition(":")
    function = getattr(importlib.import_module(module), name)
    if rank.world:
        init_distributed()
        dist.barrier()  # a rank that ends while another still connects to it would let that one fail
    result = function(*pickle.loads(rank.arguments))
    if rank.world and dist.is_initialized():
        dist.destroy_process_group()
    return result
