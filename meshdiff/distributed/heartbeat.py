"""Detection of ranks whose processes have ended or hang, to name them when the other ranks waited for them."""

from __future__ import annotations

import contextlib
import threading
import time

import torch.distributed as dist

from meshdiff.distributed.comms import WAITED
from meshdiff.distributed.simulation import is_simulated
from meshdiff.distributed.world import own_rank, store, store_address
from meshdiff.errors import InputError

__all__ = ["Heartbeats", "lost_rank"]


class Heartbeats:
    """A counter of each rank in the store of the process group that grows for as long as its process runs.

    A rank that waits in a collective, or computes, still counts; one that was
    killed or stopped does not.

    Args:
        interval: seconds between two beats.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.interval = interval
        self._ended = threading.Event()
        self._store_lost = False
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Start to count; does nothing in a world of one process."""
        if dist.is_initialized() and not is_simulated() and dist.get_world_size() > 1:
            self._thread.start()

    def stop(self) -> None:
        """Record in the store that this rank ends for a reason of its own and is not to be reported as missing."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join(timeout=4 * self.interval)  # longer only if the store hangs
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it all who could ask
                if not self._thread.is_alive():
                    store().set(_goodbye(dist.get_rank()), "")

    def missing(self) -> list[int] | None:
        """The other ranks whose counters do not grow and which did not call `stop`; takes a few intervals.

        None if the store cannot be read, because the launcher, which holds it, has ended.
        """
        if self._store_lost:
            return None
        if not self._thread.is_alive():
            return []
        try:
            return self._silent()
        except RuntimeError:
            return None

    def _silent(self) -> list[int]:
        silent = {
            rank: store().add(_beats(rank), 0) for rank in range(dist.get_world_size()) if rank != dist.get_rank()
        }
        deadline = time.monotonic() + 5 * self.interval
        while silent and time.monotonic() < deadline:
            time.sleep(self.interval / 2)
            silent = {
                rank: beats
                for rank, beats in silent.items()
                if store().add(_beats(rank), 0) == beats and not store().check([_goodbye(rank)])
            }
        return list(silent)

    def _beat(self) -> None:
        key = _beats(dist.get_rank())
        try:
            while not self._ended.wait(self.interval):
                store().add(key, 1)
        except RuntimeError:
            self._store_lost = True


def _beats(rank: int) -> str:
    return f"meshdiff/beats/{rank}"


def _goodbye(rank: int) -> str:
    return f"meshdiff/goodbye/{rank}"


def lost_rank(error: BaseException, missing: list[int] | None) -> InputError:
    """The line for a collective, or a use of the store, that failed because ranks or the launcher are missing.

    Args:
        error: the exception that it raised.
        missing: see `Heartbeats.missing`.
    """
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if missing is None:
        return InputError(
            "lost the launcher",
            f"rank {own_rank()} cannot reach the store at {store_address()} any more ({reason}); torchrun was killed, "
            "or the machine it ran on: start the same command again, a list of --prompts with --resume",
        )
    notes = [note.removeprefix(WAITED) for note in getattr(error, "__notes__", []) if note.startswith(WAITED)]
    where = notes[0] if notes else "an agreement of all ranks"
    who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "a rank"
    why = "was killed, or hangs" if missing else "did not come in time, though all are running"
    return InputError(f"lost {who}", f"rank {own_rank()} waited in {where} for one that {why} ({reason})")
