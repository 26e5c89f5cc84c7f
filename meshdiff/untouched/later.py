"""What a call will return, before it has run: whoever looks at it makes it run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from meshdiff.simulation import outside

__all__ = ["Later", "LaterTensor"]


class Later:
    """The output of a call that is put off.

    Args:
        look: makes the call run, if it has not, and gives its output.
    """

    def __init__(self, look: Callable[[], Any]) -> None:
        self._look = look

    def __getitem__(self, index: Any) -> Any:
        return LaterTensor(lambda: self._look()[index]) if index == 0 else self._look()[index]

    @property
    def sample(self) -> Tensor:
        """What most models of diffusers call their output."""
        return LaterTensor(lambda: self._look().sample)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What `isinstance` asks: whether the output is a tuple, say, only the output can tell."""
        return type(self._look())

    def __iter__(self) -> Any:
        return iter(self._look())

    def __len__(self) -> int:
        return len(self._look())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._look(), name)


class LaterTensor(Tensor):
    """A tensor that is not computed yet; anything that is done with it, or asked about it, computes it.

    Args:
        look: computes it.
    """

    _look: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, look: Callable[[], Tensor]) -> LaterTensor:
        # Torch asks the tensor itself for nothing: all questions come by `__torch_function__`.
        with outside():
            tensor = Tensor._make_subclass(cls, torch.empty(0))
        tensor._look = look
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(LaterTensor, _looked, (args, kwargs or {}))
        return func(*args, **kwargs)


def _looked(later: LaterTensor) -> Tensor:
    try:
        return later._look()
    except TypeError as error:
        # Python takes it for an operand that is not supported, and says that instead.
        raise RuntimeError(f"the call that was to compute this tensor failed: {error}") from error
