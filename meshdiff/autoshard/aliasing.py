"""A record of tensors that would share memory on one device, but are copies here.

A slice of a tensor shares its memory; the same slice of shards is a copy, once
rows have moved. That is right until the program writes to one of the two. The
record is of memory, not of tensors: a view of a shard is in the shard's memory,
so a write to it is right.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from meshdiff.distributed.simulation import is_simulated, rank_values
from meshdiff.distributed.torch_compat import DisableTorchFunction

__all__ = ["AliasTracker", "memory"]

COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}

MOMENT = 0.5
"""Seconds to wait for memory to go out of use."""


def memory(tensor: Tensor) -> UntypedStorage:
    """The memory of a plain tensor, or of this rank's part of a DTensor; in a simulation the first rank's.

    Of a sparse tensor that of its values; of others that torch gives no way to, new memory, which is no other's.
    """
    local = tensor
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            local = tensor.to_local()
    local = getattr(local, "elem", local)  # what a collective that is under way will leave
    with DisableTorchFunction():  # to ask which memory it is reads nothing that is there
        own = rank_values(local)[0]
        if own.layout != torch.strided:
            own = own._values() if own.is_sparse else own.values() if own.layout in COMPRESSED else torch.empty(0)
        return own.untyped_storage()


class AliasTracker:
    """Groups of memory that would be one on one device."""

    def __init__(self) -> None:
        # A weak reference keeps the address from being given to other memory, not the memory itself.
        self._groups: dict[int, list[StorageWeakRef]] = {}
        self.writes = 0
        """Number of writes to shards so far."""

    def prune(self) -> None:
        """Let go of memory that is not in use any more."""
        alive = {id(group): [member for member in group if not member.expired()] for group in self._groups.values()}
        groups = [group for group in alive.values() if len(group) > 1]
        self._groups = {member.cdata: group for group in groups for member in group}

    def link(self, tensor: Tensor, copy: Tensor) -> None:
        """Note that on one device these two would share memory."""
        one, other = self._group(memory(tensor)), self._group(memory(copy))
        if one is not other:
            one += other
            for member in other:
                self._groups[member.cdata] = one

    def has_live_aliases(self, tensor: Tensor) -> bool:
        """True if there is other memory, still in use, that a write to this tensor should reach."""
        if not self._groups:
            return False
        own = memory(tensor)._cdata
        others = [member for member in self._groups.get(own, ()) if member.cdata != own]
        return any(not member.expired() for member in others) and not _expire_soon(others)

    def _group(self, storage: UntypedStorage) -> list[StorageWeakRef]:
        return self._groups.setdefault(storage._cdata, [StorageWeakRef(storage)])


def _expire_soon(members: Sequence[StorageWeakRef]) -> bool:
    """True if all of this memory goes out of use within `MOMENT`: then only a thread that has sent it still held it.

    That thread lets go a moment after all ranks have waited for what it sent, sooner on some than on others,
    and ranks have to agree about what is in use.
    """
    until = time.monotonic() + (0 if is_simulated() else MOMENT)
    while not all(member.expired() for member in members):
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True
