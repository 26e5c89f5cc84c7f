"""What torch is set to around a call."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch

__all__ = ["GradState", "Surroundings"]


@dataclass(frozen=True)
class GradState:
    """What torch is set to around a call.

    Attributes:
        autocast: the dtype of each device type, None where it is off.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype | None], ...]

    @staticmethod
    def capture(device_type: str) -> GradState:
        """As it is set now, for the CPU and another type of device."""
        kinds = sorted({"cpu", device_type})
        autocast = tuple((kind, _autocast(kind)) for kind in kinds)
        return GradState(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    @contextmanager
    def restore(self) -> Iterator[None]:
        """While a call runs that was made then."""
        with ExitStack() as stack:
            if self.inference != torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast:
                if dtype != _autocast(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
            yield


class Surroundings:
    """What else was there around a call: context variables, and modes of torch functions and of operations."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._modes = _modes()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Surroundings) or self._modes != other._modes:
            return False
        own, theirs = self._context, other._context
        return len(own) == len(theirs) and all(theirs.get(key, ...) is value for key, value in own.items())

    __hash__ = None  # type: ignore[assignment]

    def run(self, call: Callable[[], Any]) -> Any:
        """Call a function as if it was called there."""
        if _modes() != self._modes:
            with _under(self._modes):
                return self.run(call)
        if self == Surroundings():
            return call()  # so that what it sets is seen by the caller
        return self._context.run(call)


Modes = tuple[tuple[Any, ...], tuple[Any, ...]]


def _modes() -> Modes:
    """By private functions of torch 2.11 and 2.13, which has no others that tell."""
    return tuple(overrides._get_current_function_mode_stack()), tuple(dispatch._get_current_dispatch_mode_stack())


@contextmanager
def _under(modes: Modes) -> Iterator[None]:
    now = _modes()
    _replace(now, modes)
    try:
        yield
    finally:
        _replace(modes, now)


def _replace(old: Modes, new: Modes) -> None:
    for place, own in enumerate((overrides, dispatch)):
        for _ in old[place]:
            own._pop_mode()  # type: ignore[attr-defined]
        for mode in new[place]:
            own._push_mode(mode)  # type: ignore[attr-defined]


def _autocast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
