"""The communication of a program: the count and bytes of every collective, by mesh dim."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.distributed.mesh import groups_within
from meshdiff.distributed.simulation import largest, on_each_rank
from meshdiff.distributed.torch_compat import HigherOrderOperator, TorchDispatchMode, process_group, tree_flatten

__all__ = ["WAITED", "CommsCounter", "Traffic"]

WAITED = "waited in "
"""The prefix of the note on an error that names the collective, and its mesh dim, in which the error was raised."""


@dataclass
class Traffic:
    """Calls of one collective on one mesh dim, and the bytes that one rank sent to others in them.

    For a collective with a root, these are the bytes that the root sent.
    """

    count: int = 0
    bytes: int = 0


# What one rank sends to others in a collective, of `nbytes` it puts in.
# `splits` are the parts of an uneven exchange, by receiver; empty when even.


def _to_each(nbytes: int, ranks: int, rank: int, splits: list[int]) -> int:
    return nbytes * (ranks - 1)


def _all_but_own(nbytes: int, ranks: int, rank: int, splits: list[int]) -> int:
    if splits:
        return nbytes - splits[rank] * nbytes // max(1, sum(splits))
    return nbytes * (ranks - 1) // ranks


def _twice(nbytes: int, ranks: int, rank: int, splits: list[int]) -> int:
    return 2 * nbytes * (ranks - 1) // ranks  # a reduce-scatter and an all-gather


def _once(nbytes: int, ranks: int, rank: int, splits: list[int]) -> int:
    return nbytes


@dataclass(frozen=True)
class _Collective:
    name: str
    sent: Callable[[int, int, int, list[int]], int]
    payload: int = 0  # which argument holds what the rank puts in
    splits: int | None = None  # which argument holds the split sizes


_COLLECTIVES = {
    # What DTensor and functional collectives call.
    "_c10d_functional::all_gather_into_tensor": _Collective("all_gather", _to_each),
    "_c10d_functional::all_gather_into_tensor_coalesced": _Collective("all_gather", _to_each),
    "_c10d_functional::all_to_all_single": _Collective("all_to_all", _all_but_own, splits=2),
    "_c10d_functional::all_reduce": _Collective("all_reduce", _twice),
    "_c10d_functional::all_reduce_coalesced": _Collective("all_reduce", _twice),
    "_c10d_functional::reduce_scatter_tensor": _Collective("reduce_scatter", _all_but_own),
    "_c10d_functional::reduce_scatter_tensor_coalesced": _Collective("reduce_scatter", _all_but_own),
    "_c10d_functional::broadcast": _Collective("broadcast", _to_each),
    "_dtensor::shard_dim_alltoall": _Collective("all_to_all", _all_but_own),
    # What `torch.distributed` functions and older DTensor paths call.
    "c10d::_allgather_base_": _Collective("all_gather", _to_each, payload=1),
    "c10d::allgather_": _Collective("all_gather", _to_each, payload=1),
    "c10d::allgather_into_tensor_coalesced_": _Collective("all_gather", _to_each, payload=1),
    "c10d::alltoall_base_": _Collective("all_to_all", _all_but_own, payload=1, splits=4),
    "c10d::alltoall_": _Collective("all_to_all", _all_but_own, payload=1),
    "c10d::allreduce_": _Collective("all_reduce", _twice),
    "c10d::allreduce_coalesced_": _Collective("all_reduce", _twice),
    "c10d::_reduce_scatter_base_": _Collective("reduce_scatter", _all_but_own, payload=1),
    "c10d::reduce_scatter_": _Collective("reduce_scatter", _all_but_own, payload=1),
    "c10d::broadcast_": _Collective("broadcast", _to_each),
    "c10d::scatter_": _Collective("scatter", _all_but_own, payload=1),
    "c10d::gather_": _Collective("gather", _once, payload=1),
    "c10d::reduce_": _Collective("reduce", _once),
    "c10d::send": _Collective("send", _once),
}


class CommsCounter(TorchDispatchMode):
    """Counts every collective that tensors in its body take part in, by mesh dim.

    Collectives inside DTensor operations count as well. In a simulation the
    bytes are those of the rank that sends most.

    Args:
        mesh: the mesh whose dims give the counts their names. Groups that a dim
            was divided into count as that dim, others under "world" or "other".

    Example:
        >>> with CommsCounter(mesh) as comms:
        ...     velocity = model(x)
        >>> comms.traffic["cp"]["all_to_all"]
        Traffic(count=12, bytes=294912)
    """

    supports_higher_order_operators = True  # such as flex attention, which sends nothing

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.traffic: dict[str, dict[str, Traffic]] = defaultdict(lambda: defaultdict(Traffic))
        self._mesh = mesh
        self._last = ""  # collective

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let `torch.compile` compile the code it counts; collectives of compiled code still pass through this mode."""
        return True

    def as_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        """`{mesh dim: {collective: {"count": calls, "bytes": sent by one rank}}}`."""
        return {
            dim: {name: {"count": t.count, "bytes": t.bytes} for name, t in sorted(collectives.items())}
            for dim, collectives in sorted(self.traffic.items())
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A DTensor operation is made of operations on local tensors, which come by here in turn.
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        name = "" if isinstance(func, HigherOrderOperator) else func._schema.name
        if name in _COLLECTIVES:
            self._record(_COLLECTIVES[name], args)
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if name in _COLLECTIVES or name == "_c10d_functional::wait_tensor":
                error.add_note(f"{WAITED}{self._last}")
            raise

    def _record(self, collective: _Collective, args: tuple[Any, ...]) -> None:
        group = _group_of(args)
        dim, own_rank = self._dim(group)
        payload = [t for t in tree_flatten(args[collective.payload])[0] if isinstance(t, Tensor)]
        splits = list(args[collective.splits]) if collective.splits else []

        @on_each_rank
        def sent(rank: int, splits: list[int], *payload: Tensor) -> int:
            return collective.sent(sum(t.nbytes for t in payload), group.size(), rank, splits)

        self._last = f"{collective.name} on {dim}"
        self.count(dim, collective.name, largest(sent(own_rank, splits, *payload)))

    def count(self, dim: str, collective: str, nbytes: int) -> None:
        """Add one call of a collective to the traffic."""
        traffic = self.traffic[dim][collective]
        traffic.count += 1
        traffic.bytes += nbytes

    def _dim(self, group: dist.ProcessGroup) -> tuple[str, Any]:
        """The mesh dim that a group belongs to, and this rank's place in the group."""
        for name in self._mesh.mesh_dim_names or ():
            whole = self._mesh.get_group(name)
            if group.group_name == whole.group_name:
                return name, self._mesh.get_local_rank(name)
            for part, rank in groups_within(whole):
                if group.group_name == part:
                    return name, rank
        return ("world" if group.size() == dist.get_world_size() else "other"), 0


def _group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """The process group among a collective's arguments, which older and newer torch name differently."""
    for arg in reversed(args):  # a reduction's name, a string as well, comes before its group's
        if isinstance(arg, str):
            return process_group(arg)  # type: ignore[arg-type]  # a NewType of str since torch 2.13
        if isinstance(arg, dist.ProcessGroup):
            return arg
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    raise AssertionError(f"no process group among {args}")
