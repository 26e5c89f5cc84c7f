"""What ranks must agree on before they meet in a collective, where a disagreement would hang."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from meshdiff.errors import InputError
from meshdiff.simulation import is_simulated

__all__ = ["agreed", "check_same", "explained", "first_to_fail", "from_every_rank", "is_first_rank"]

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this rank does the talking and the writing."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_every_rank(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks, on every rank; a collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or is_simulated():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def agreed() -> Iterator[None]:
    """If one rank's body raises `InputError`, every rank does, so that none waits for ever; a collective.

    Other exceptions pass as they are: they end the process, which ends the job.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as raised:
        error = raised
    errors = from_every_rank(error)
    failed = {rank: other for rank, other in enumerate(errors) if other is not None}
    if not failed:
        return
    first = next(iter(failed.values()))
    if len(failed) == len(errors):
        raise first
    raise InputError(f"rank {', '.join(map(str, failed))} of {len(errors)}: {first.source}", first.problem)


def check_same(flags: Mapping[str, object]) -> None:
    """Raise `InputError` on every rank if ranks were started with different flags; a collective."""
    ranks = from_every_rank(dict(flags))
    for flag, value in ranks[0].items():
        for rank, other in enumerate(ranks):
            if other.get(flag) != value:
                raise InputError(
                    flag, f"is {value} on rank 0 and {other.get(flag)} on rank {rank}; start every rank with the same"
                )


def first_to_fail() -> bool:
    """Whether no other rank has failed before: the first knows why, the others only miss it. No collective."""
    if not dist.is_initialized() or is_simulated():
        return True
    return dist.distributed_c10d._get_default_store().add("meshdiff/failed", 1) == 1


def explained(error: BaseException) -> InputError | None:
    """What one rank alone ran into that is no fault of the program, in one line; None for anything else."""
    rank = f"rank {dist.get_rank()}" if dist.is_initialized() and not is_simulated() else "this process"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in reason:
        to_host = "--low-memory 1 to 3 moves weights to host memory, " * torch.cuda.is_available()
        return InputError(
            "out of memory",
            f"on {rank} ({reason}); more ranks with --cp divide activations, --shard-weights divides weights, "
            f"{to_host}a smaller clip needs less of everything",
        )
    if isinstance(error, dist.DistError) or "gloo" in reason:
        return InputError("lost ranks", f"{rank} waited for another that did not come ({reason})")
    return None
