"""The world of ranks that torchrun started: forming it, and the store that its ranks share."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from meshdiff.distributed.simulation import is_simulated
from meshdiff.distributed.torch_compat import default_store
from meshdiff.errors import InputError

__all__ = [
    "first_failure",
    "init_distributed",
    "keep_order_of_sums",
    "launched_world_size",
    "own_rank",
    "recall",
    "remember",
    "store",
    "store_address",
]

_stores: dict[str, dist.Store] = {}
"""Stores of a launched world: "run", which a restart by torchrun keeps, and "attempt", which it does not."""


def launched_world_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun.

    Raises:
        InputError: if the environment variable is not a number.
    """
    return _number("WORLD_SIZE", "1")


def own_rank() -> int:
    """This process's number in the world, which may be yet to be formed; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() and not is_simulated() else _number("RANK", "0")


def keep_order_of_sums() -> None:
    """Let matrix products on CPUs add up in an order that does not depend on the number of rows.

    A rank's shard has fewer rows than the whole sequence, and by default MKL chooses its kernel, and with it the order
    of summation, by the number of rows and by the alignment in memory. Strict conditional numerical reproducibility
    (oneMKL developer guide, "Obtaining Numerically Reproducible Results") rules that out. MKL reads the variable
    before its first product in a process, so a call after that one has no effect; neither has it on a
    build of torch without MKL. A value that is set already is left as it is.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def init_distributed(timeout: timedelta | None = None) -> None:
    """Start `torch.distributed` from torchrun's environment; without torchrun, a world of one process.

    Does nothing if it has been started. Where there are GPUs the world has
    nccl for CUDA tensors and gloo for the rest, so ranks can communicate
    before they agree on a device.

    Args:
        timeout: the time that a rank waits for the others before it raises. With
            torch's own default of 30 minutes on gloo, a dead rank goes unnoticed.

    Raises:
        InputError: if the environment is incomplete, or the ranks cannot reach each other.
    """
    if dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timeout or timedelta(seconds=600 if cuda else 120)
    world = launched_world_size()
    if world > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise InputError("WORLD_SIZE", f"is set, but {', '.join(missing)} not; start the program with torchrun")
        if own_rank() >= world:
            raise InputError("RANK", f"{own_rank()} given, needs to be below WORLD_SIZE, which is {world}")
    try:
        if world > 1:
            _stores["attempt"] = _store_of_attempt(_store_of_run(timeout), own_rank(), world, timeout)
            dist.init_process_group(
                backend, store=_stores["attempt"], rank=own_rank(), world_size=world, timeout=timeout
            )
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise _cannot_start(error, world) from error


def _number(name: str, default: str) -> int:
    given = os.environ.get(name, default)
    if not given.isdecimal():
        raise InputError(name, f"{given!r} in the environment is no number; start the program with torchrun")
    return int(given)


def _store_of_run(timeout: timedelta) -> dist.Store:
    """The store of torchrun's agent, or of rank 0 where ranks were started by hand."""
    if "run" not in _stores:
        _number("MASTER_PORT", "")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or own_rank() > 0:
            _wait_for_server(timeout)
        store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
        store.set_timeout(timeout)
        _stores["run"] = store
    return _stores["run"]


def _wait_for_server(timeout: timedelta) -> None:
    """Raise if the store's server does not answer in time; torch itself prints pages of C++ frames about it."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], _number("MASTER_PORT", "")), left).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _store_of_attempt(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A part of the run's store that the ranks of this attempt alone use; every rank calls it.

    After a restart by torchrun the store still holds the addresses of ranks
    that have ended, and gloo would connect to them. The number of restarts that
    torchrun counts does not distinguish attempts: each node counts its own. So
    rank 0 draws a name, and another rank uses it once rank 0 has answered it,
    which rank 0 of an earlier attempt can no longer do.
    """
    own, key = uuid.uuid4().hex, "meshdiff/attempt"
    if rank == 0:
        store.set(key, own)
        others = [f"{key}/{own}/{other}" for other in range(1, world)]
        _wait(store, others, timeout)
        store.set(f"{key}/{own}", " ".join(store.get(other).decode() for other in others))
        return dist.PrefixStore(f"{key}/{own}", store)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if store.check([key]):
            attempt = f"{key}/{store.get(key).decode()}"
            store.set(f"{attempt}/{rank}", own)
            if store.check([attempt]) and own in store.get(attempt).decode().split():
                return dist.PrefixStore(attempt, store)
        time.sleep(0.05)
    raise dist.DistStoreError(f"rank 0 did not come within {timeout.total_seconds():g} seconds")


def _wait(store: dist.Store, keys: list[str], timeout: timedelta) -> None:
    try:
        if keys:
            store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [key.rpartition("/")[2] for key in keys if not store.check([key])]
        if not missing:
            raise
        late = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} did not come"
        raise dist.DistStoreError(f"{late} within {timeout.total_seconds():g} seconds") from error


def _cannot_start(error: Exception, world: int) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = re.sub(r"^\[enforce fail at [^]]*\] (\S+ [!=<>]+ \S+\. )?", "", reason)  # a line of gloo's source
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    network = f"GLOO_SOCKET_IFNAME, now {interface}," if interface else "GLOO_SOCKET_IFNAME"
    if world == 1:
        return InputError("cannot start", f"{reason}; {network} is to name a network interface of this machine")
    return InputError(
        "cannot start",
        f"rank {own_rank()} of {world} did not meet the others at {store_address()} ({reason}); all of them must be "
        f"running and reach that address, {network} must name a network interface, --timeout waits longer",
    )


def store_address() -> str:
    """The host and port of the store that ranks share."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def store() -> dist.Store:
    """The store that all ranks read and write without waiting for each other, also if their process group is not made.

    Raises:
        ValueError: if there is none, as in a process that has started no world.
    """
    if not dist.is_initialized() and "attempt" in _stores:
        return _stores["attempt"]
    return default_store()


def first_failure(line: str) -> tuple[bool, str]:
    """True if this rank is the first to fail, and the line of the first rank that failed; no collective.

    A rank that cannot reach the store counts as the first.

    Args:
        line: the reason why this rank failed.
    """
    try:
        if is_simulated() or launched_world_size() == 1:
            return True, line
        own = str(own_rank())
        line = line.encode("utf-8", "backslashreplace").decode()  # the store takes no half characters
        first = store().compare_set("meshdiff/failed", "", f"{own} {line}").decode()
    except (InputError, RuntimeError, ValueError):  # the environment is wrong, or the store gone or never reached
        return True, line
    rank, _, reason = first.partition(" ")
    return rank == own, reason


def remember(name: str, value: str) -> None:
    """Keep a value for `recall` in this attempt and in those after a restart by torchrun."""
    if (run := _run_of_torchrun()) is not None:
        run.set(f"meshdiff/run/{name}", json.dumps(value))  # which takes any path


def recall(name: str) -> str | None:
    """The value that was given to `remember` last; None without torchrun, and if there is none."""
    key = f"meshdiff/run/{name}"
    run = _run_of_torchrun()
    return json.loads(run.get(key)) if run is not None and run.check([key]) else None


def _run_of_torchrun() -> dist.Store | None:
    """The store of torchrun's agent, to which a single rank connects only here; None without torchrun."""
    if is_simulated() or "TORCHELASTIC_RUN_ID" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    return _store_of_run(timedelta(seconds=30))
