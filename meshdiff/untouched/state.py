"""What torch is set to around a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Ambient"]


@dataclass(frozen=True)
class Ambient:
    """What torch is set to around a call.

    Attributes:
        autocast: the dtype of each device type, None where it is off.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype | None], ...]

    @staticmethod
    def now(device_type: str) -> Ambient:
        """As it is set now, for the CPU and another type of device."""
        kinds = sorted({"cpu", device_type})
        autocast = tuple((kind, _autocast(kind)) for kind in kinds)
        return Ambient(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    @contextmanager
    def again(self) -> Iterator[None]:
        """While a call runs that was made then."""
        with ExitStack() as stack:
            if self.inference != torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast:
                if dtype != _autocast(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
            yield


def _autocast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
