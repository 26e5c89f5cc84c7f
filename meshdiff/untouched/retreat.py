"""Starting a call again, on whole tensors: when that is right, and that all ranks do it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from meshdiff.agreement import store
from meshdiff.simulation import is_simulated

__all__ = ["Before", "agree_to_retreat", "explain"]


class Before:
    """What a call started from, to see whether it can be started again.

    Args:
        module: the model.
        args, kwargs: what it is called with.
    """

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.module, self.arguments = module, (args, kwargs)
        self.tensors = [
            t for t in [*tree_leaves(self.arguments), *module.state_dict().values()] if isinstance(t, Tensor)
        ]
        self.versions = [tensor._version for tensor in self.tensors]
        self.state = self._state()

    def check(self, error: Exception) -> None:
        """Raise if the call has changed what it started from.

        Raises:
            RuntimeError: saying that the next call will do.
        """
        changed = [t for t, version in zip(self.tensors, self.versions, strict=True) if t._version != version]
        if changed or self._state() != self.state:
            raise RuntimeError(
                f"{type(self.module).__name__} cannot run on shards as it was tried ({explain(error)}), and it has "
                "changed its inputs or its own state before that was noticed; start it again from fresh inputs"
            ) from error

    def _state(self) -> list[Any]:
        own = [
            (name, key, id(value), _size(value))
            for name, part in self.module.named_modules()
            for key, value in vars(part).items()
            if not key.startswith("_") or not isinstance(value, dict)
        ]
        return own + [id(leaf) for leaf in tree_leaves(self.arguments)]


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (list, dict, set)) else 0


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
