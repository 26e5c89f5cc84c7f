"""The end of a rank after an error: one line for the user, and the same line for torchrun's report."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist

from meshdiff.distributed.consensus import is_collective_error, is_first_rank
from meshdiff.distributed.heartbeat import Heartbeats, lost_rank
from meshdiff.distributed.launch import report_failure
from meshdiff.distributed.simulation import is_simulated
from meshdiff.distributed.world import first_failure, own_rank
from meshdiff.errors import InputError

__all__ = ["as_input_error", "ended_by", "ended_by_signal"]


def ended_by(error: Exception, heartbeats: Heartbeats) -> int | None:
    """Print the reason why this rank has to end, in a line, unless another rank has done so.

    Needs neither the process group nor the store: the error may be the loss of either.

    Args:
        error: the exception that was raised.
        heartbeats: those of this process.

    Returns:
        The exit code; None for a fault of the program, which needs its traceback.
    """
    _hold_off_launcher()
    if isinstance(error, InputError):
        explanation: InputError | None = error
    else:
        explanation = lost_rank(error, heartbeats.missing()) if is_collective_error(error) else as_input_error(error)
    code = getattr(explanation, "exit_code", 2)
    if code == 0:
        if is_first_rank():
            print(explanation, flush=True)
        return code
    first, line = first_failure(str(explanation or f"{type(error).__name__}: {error}"))
    if explanation is None:
        return None
    report_failure(line)
    if is_first_rank() if explanation.everywhere else first:
        print(explanation, file=sys.stderr, flush=True)
    return code


def ended_by_signal(code: int, heartbeats: Heartbeats) -> int:
    """The exit code of a rank that a signal ends; if other ranks are missing, prints a line about that first.

    Args:
        code: exit code if no rank is missing.
        heartbeats: those of this process.
    """
    _hold_off_launcher()
    missing = heartbeats.missing()
    if not missing:
        return code
    named = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    lost = InputError(f"lost {named}", f"the launcher ended rank {own_rank()} because of one that was killed, or hangs")
    return ended_by(lost, heartbeats) or 2


def _hold_off_launcher() -> None:
    """Ignore SIGTERM, which the launcher sends when another rank has ended, until the reason has been printed."""
    if "RANK" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def as_input_error(error: BaseException) -> InputError | None:
    """A one-line error for a failure of one rank that is no fault of the program; None for any other failure."""
    rank = f"rank {own_rank()}" if dist.is_initialized() and not is_simulated() else "this process"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in reason:
        to_host = "--low-memory 1 to 3 moves weights to host memory, " * torch.cuda.is_available()
        return InputError(
            "out of memory",
            f"on {rank} ({reason}); more ranks with --cp divide activations, --shard-weights divides weights, "
            f"{to_host}a smaller clip needs less of everything",
        )
    return None
