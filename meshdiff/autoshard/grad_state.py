"""The settings of torch around a call, and other things that were there when it was made."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from meshdiff.distributed.torch_compat import Modes, mode_stacks, replace_mode_stacks

__all__ = ["GradState", "Surroundings"]


@dataclass(frozen=True)
class GradState:
    """The settings of torch around a call.

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
    """Context variables around a call, and modes of torch functions and of operations."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._modes = mode_stacks()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Surroundings) and self._modes == other._modes and self._has(other._context)

    __hash__ = None  # type: ignore[assignment]  # as Python sets it, which typeshed calls a function

    def _has(self, context: contextvars.Context) -> bool:
        """True if the variables of a context are those that there were."""
        own = self._context
        return len(own) == len(context) and all(context.get(key, ...) is value for key, value in own.items())

    def run(self, call: Callable[[], Any]) -> Any:
        """Call a function as if it was called there."""
        with nullcontext() if mode_stacks() == self._modes else _under(self._modes):
            if self._has(contextvars.copy_context()):
                return call()  # so that what it sets is seen by the caller
            return self._context.run(call)


@contextmanager
def _under(modes: Modes) -> Iterator[None]:
    now = mode_stacks()
    replace_mode_stacks(now, modes)
    try:
        yield
    finally:
        replace_mode_stacks(modes, now)


def _autocast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
