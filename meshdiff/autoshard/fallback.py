"""Starting a call again, on whole tensors: when that is right, and that all ranks do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot, Unrestorable
from meshdiff.distributed.consensus import store
from meshdiff.distributed.simulation import is_simulated

__all__ = ["Before", "agree_on_fallback", "one_line"]


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
                f"{type(self._snapshot.module).__name__} cannot run on shards as it was tried ({one_line(error)}), and "
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


def agree_on_fallback(mesh: DeviceMesh, name: str, kind: str, error: Exception) -> None:
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
        raise RuntimeError(f"other ranks have gone another way; what ended the call here: {one_line(error)}") from error
    kinds = {rank: store().get(key).decode() for rank, key in keys.items()}
    if set(kinds.values()) != {kind}:
        raise RuntimeError(f"ranks disagree about what cannot run on shards: {kinds}")


def one_line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return f"{text[:200] or type(error).__name__}"
