"""Agreement of ranks before they meet in a collective, in which a disagreement would hang."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.distributed.simulation import is_simulated
from meshdiff.distributed.world import store
from meshdiff.errors import InputError

__all__ = [
    "after_first_rank",
    "agreed",
    "all_gather_object",
    "check_same",
    "is_collective_error",
    "is_first_rank",
    "store",
]

T = TypeVar("T")

OF_GLOO = re.compile(r"\bgloo\b", re.IGNORECASE)
"""Pattern found in messages of gloo's errors, which have no class of their own."""


def is_first_rank(mesh: DeviceMesh | None = None) -> bool:
    """True if this rank is the first of a mesh or of the world: the one that prints and writes."""
    if not dist.is_initialized() or is_simulated():
        return True
    return dist.get_rank() == 0 if mesh is None else not any(mesh.get_coordinate() or ())


def all_gather_object(value: T, mesh: DeviceMesh | None = None, what: str = "") -> list[T]:
    """The `value` of every rank, of a mesh or of the world, in the order of ranks, on every rank; a collective.

    Args:
        value: an object that can be pickled.
        mesh: the ranks that meet here; by default all.
        what: the purpose of the call, to be compared between ranks that might be at different calls.

    Raises:
        RuntimeError: on every rank, if they do not all meet for `what`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or is_simulated():
        return [value]
    values: list[Any] = [_Meeting(what, value) if what else value]
    groups = [None] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
    for group in reversed(groups):  # neighbours are along the last dim
        if dist.get_world_size(group) > 1:
            gathered: list[list[Any]] = [values] * dist.get_world_size(group)
            dist.all_gather_object(gathered, values, group=group)
            values = list(chain.from_iterable(gathered))
    for rank, of_rank in enumerate(values):
        other = of_rank.what if isinstance(of_rank, _Meeting) else ""
        if other != what:
            here, there = what or "something else", other or "something else"
            raise RuntimeError(
                f"ranks do not do the same: one is at {here}, rank {rank} of this mesh at {there}; one that ended "
                "a call with an error of its own, out of memory say, cannot go on alone"
            )
    return [of_rank.value for of_rank in values] if what else values


class _Meeting(NamedTuple):
    """The value of a rank, and the purpose of its call, as another rank may be at a different call."""

    what: str
    value: Any


@contextmanager
def agreed(mesh: DeviceMesh | None = None) -> Iterator[None]:
    """Raise `InputError` on every rank if one rank's body does, so that no rank waits forever; a collective.

    All ranks of a mesh or of the world take part. Other exceptions pass as they
    are: they end the process, which ends the job.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as raised:
        error = raised
    errors = all_gather_object(error, mesh)
    failed = {rank: other for rank, other in enumerate(errors) if other is not None}
    if not failed:
        return
    first = next(iter(failed.values()))
    if len(failed) < len(errors):
        first = InputError(f"rank {', '.join(map(str, failed))} of {len(errors)}: {first.source}", first.problem)
    # Of a mesh that is a part of the world, the others go on.
    first.everywhere = mesh is None
    raise first


def check_same(flags: Mapping[str, object]) -> None:
    """Raise `InputError` on every rank if ranks were started with different flags; a collective."""
    ranks = all_gather_object(dict(flags))
    for flag, value in ranks[0].items():
        for rank, other in enumerate(ranks):
            if other.get(flag) != value:
                error = InputError(
                    flag, f"is {value} on rank 0 and {other.get(flag)} on rank {rank}; start every rank with the same"
                )
                error.everywhere = True
                raise error


def after_first_rank(name: str) -> None:
    """Wait without a time-out until the first rank has called this as well; not a collective.

    Args:
        name: name of this call, used once in a run.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or is_simulated():
        return
    if is_first_rank():
        store().set(f"meshdiff/{name}", "done")
    while not store().check([f"meshdiff/{name}"]):
        time.sleep(0.1)


def is_collective_error(error: BaseException) -> bool:
    """True if the error reports that a collective failed, as it does when a rank is missing."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or bool(OF_GLOO.search(str(error))))
