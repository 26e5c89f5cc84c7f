"""Starting a call again, on replicated tensors: checks that this is right, and that all ranks do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot, Unrestorable
from meshdiff.autoshard.snapshot.policy import Policy
from meshdiff.distributed.consensus import store
from meshdiff.distributed.simulation import is_simulated

__all__ = ["agree_on_fallback", "one_line", "restore_after", "start_again"]


def restore_after(error: Exception, before: ModuleSnapshot) -> None:
    """Put back what a call has changed of the model and of its inputs before it ended with an error.

    Args:
        error: which ended it.
        before: what it started from, a `RESTORE`.

    Raises:
        RuntimeError: if it has written to weights, of which there is no copy; the next call will do.
    """
    try:
        before.restore(before.retake())
    except Unrestorable as lost:
        raise RuntimeError(
            f"{type(before.module).__name__} cannot run on shards as it was tried ({one_line(error)}), and it has "
            f"written to {lost} before that was noticed; load its weights again and start again, it will then run on "
            "replicated tensors"
        ) from error


@contextmanager
def start_again(before: ModuleSnapshot) -> Iterator[None]:
    """Start from a `RESTORE` in the body, after which model and inputs are as they were when it began.

    Raises:
        RuntimeError: if the call since then has written to weights, or the body does.
    """
    after = ModuleSnapshot(before.module, Policy.RESTORE, before.arguments)
    try:
        before.restore(after)
        yield
        after.restore(after.retake())
    except Unrestorable as lost:
        model = type(before.module).__name__
        raise RuntimeError(f"{model} writes to {lost}: it cannot be run a second time to compare") from lost


def agree_on_fallback(mesh: DeviceMesh, name: str, kind: str, error: Exception) -> None:
    """Wait until every rank is about to start again, without a collective: others may be in the middle of one.

    Raises:
        RuntimeError: if they do not come, with what has ended the call here, or come for another reason.
    """
    if is_simulated() or mesh.size() == 1:
        return
    ranks = mesh.mesh.flatten().tolist()
    keys = {rank: f"meshdiff/fallback/{name}/{rank}" for rank in ranks}
    store().set(keys[dist.get_rank()], kind)
    try:
        store().wait(list(keys.values()))
    except dist.DistStoreError:
        raise RuntimeError(
            f"this rank started the call again ({one_line(error)}), and the others did not within the time-out; all "
            "ranks must run the same model on the same inputs"
        ) from error
    kinds = {rank: store().get(key).decode() for rank, key in keys.items()}
    if set(kinds.values()) != {kind}:
        raise RuntimeError(f"ranks disagree about what cannot run on shards: {kinds}")


def one_line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return f"{text[:200] or type(error).__name__}"
