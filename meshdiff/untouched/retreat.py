"""Starting a call again, on whole tensors: when that is right, and that all ranks do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from meshdiff.agreement import from_every_rank, store
from meshdiff.attention.checks import digest
from meshdiff.simulation import is_simulated, rank_values
from meshdiff.untouched.snapshot import ModuleSnapshot, Unrestorable

__all__ = ["Before", "agree_to_retreat", "check_alike", "explain"]


class Before:
    """What a call started from, so that it can be started again.

    Args:
        module: the model.
        args, kwargs: what it is called with.
    """

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._snapshot = ModuleSnapshot(module, (args, kwargs), copies=True)

    def restore(self, error: Exception) -> None:
        """Put back what the call has changed of the model and of its inputs before it ended with an error.

        Raises:
            RuntimeError: if it has written to weights, of which there is no copy; the next call will do.
        """
        now = self._snapshot.again()
        if now is self._snapshot:
            return
        try:
            self._snapshot.restore(now)
        except Unrestorable as lost:
            raise RuntimeError(
                f"{type(self._snapshot.module).__name__} cannot run on shards as it was tried ({explain(error)}), and "
                f"it has written to {lost} before that was noticed; load its weights again and start again, it will "
                "then run on whole tensors"
            ) from error

    @contextmanager
    def once_more(self) -> Iterator[None]:
        """Start from the same again in the body, after which model and inputs are as they were when it began.

        Raises:
            RuntimeError: if the call has written to weights.
        """
        after = ModuleSnapshot(self._snapshot.module, self._snapshot.arguments, copies=True)
        try:
            self._snapshot.restore(after)
            yield
            after.restore(after.again())
        except Unrestorable as lost:
            model = type(self._snapshot.module).__name__
            raise RuntimeError(f"{model} writes to {lost}: it cannot be run a second time to compare") from lost


def check_alike(mesh: DeviceMesh, module: nn.Module, arguments: Any, weights: bool = True) -> None:
    """Raise on every rank if they were given different tensors, or hold different weights; a collective.

    Of the arguments all values are compared, of each weight and buffer the sum of its bits.

    Args:
        mesh: of the ranks to compare.
        module: the model.
        arguments: what it is called with.
        weights: compare these as well, which takes a pass over all of them.

    Raises:
        ValueError: that names the rank, and what to do.
    """
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    of_module = (*module.parameters(), *module.buffers()) if weights else ()
    held = [tensor.detach() for tensor in of_module if not tensor.is_meta]
    facts = [_facts(given, digest), _facts(held, _sum_of_bits)]
    ranks = from_every_rank(facts, mesh)
    if is_simulated():
        ranks = [[_facts(given, digest, rank), _facts(held, _sum_of_bits, rank)] for rank in range(mesh.size())]
    for rank, found in enumerate(ranks):
        for what, own, first in zip(("inputs", "weights"), found, ranks[0], strict=True):
            if own != first:
                raise ValueError(
                    f"{type(module).__name__} has other {what} on rank {rank} of this mesh than on rank 0; give every "
                    "rank the same, random numbers from the same seed: torch.manual_seed(0), or a generator of its own"
                )


def _facts(tensors: list[Tensor], name: Callable[[Tensor], Any], rank: int = 0) -> list[tuple[Any, ...]]:
    values = [held[min(rank, len(held) - 1)] for held in map(rank_values, tensors)]
    return [(tuple(value.shape), value.dtype, name(value)) for value in values]


def _sum_of_bits(tensor: Tensor) -> int:
    """Where the tensor is, in one pass: weights are large."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return int(values.contiguous().view(integers).sum(dtype=torch.int64))


def agree_to_retreat(mesh: DeviceMesh, name: str, kind: str, error: Exception) -> None:
    """Wait until every rank is about to start again, without a collective: others may be in the middle of one.

    Raises:
        RuntimeError: if they do not come, with what has ended the call here, or come for another reason.
    """
    if is_simulated() or mesh.size() == 1:
        return
    ranks = mesh.mesh.flatten().tolist()
    keys = {rank: f"meshdiff/retreat/{name}/{rank}" for rank in ranks}
    store().set(keys[dist.get_rank()], kind)
    try:
        store().wait(list(keys.values()))
    except dist.DistStoreError:
        raise RuntimeError(f"other ranks have gone another way; what ended the call here: {explain(error)}") from error
    kinds = {rank: store().get(key).decode() for rank, key in keys.items()}
    if set(kinds.values()) != {kind}:
        raise RuntimeError(f"ranks disagree about what cannot run on shards: {kinds}")


def explain(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return f"{text[:200] or type(error).__name__}"
