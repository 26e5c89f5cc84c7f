"""Which ranks are still there, for a line that says whom the others waited for."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

from meshdiff.agreement import store
from meshdiff.comms import WAITED
from meshdiff.errors import InputError
from meshdiff.simulation import is_simulated

__all__ = ["Heartbeats", "lost_rank"]


class Heartbeats:
    """A number of each rank in the store of the process group that grows for as long as its process runs.

    A rank that waits in a collective, or computes, still counts; one that was
    killed or stopped does not.

    Args:
        interval: seconds between two beats.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.interval = interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Does nothing in a world of one process."""
        if dist.is_initialized() and not is_simulated() and dist.get_world_size() > 1:
            self._thread.start()

    def stop(self) -> None:
        """Say goodbye: this rank ends, for a reason of its own, and is not to be missed."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
            store().set(_goodbye(dist.get_rank()), "")

    def missing(self) -> list[int]:
        """The other ranks that neither beat nor said goodbye; takes a few beats to find out."""
        if not self._thread.is_alive():
            return []
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
        except RuntimeError:  # the store is gone, and with it all who could ask
            return


def _beats(rank: int) -> str:
    return f"meshdiff/beats/{rank}"


def _goodbye(rank: int) -> str:
    return f"meshdiff/goodbye/{rank}"


def lost_rank(error: BaseException, missing: list[int]) -> InputError:
    """The line for a collective that failed because ranks of the mesh are missing."""
    notes = [note.removeprefix(WAITED) for note in getattr(error, "__notes__", []) if note.startswith(WAITED)]
    where = notes[0] if notes else "an agreement of all ranks"
    who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "a rank"
    why = "was killed, or hangs" if missing else "did not come in time, though all are running"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"lost {who}", f"rank {dist.get_rank()} waited in {where} for one that {why} ({reason})")
