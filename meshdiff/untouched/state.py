"""What must not change between a call that is put off and the time that it runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshdiff.simulation import outside, rank_values

__all__ = ["DICTS", "MEMBERS", "OF_CALLS", "SMALL", "Ambient", "ModelState", "version"]

Kind = tuple[torch.device, torch.dtype]

SMALL = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
DICTS = frozenset({dict, OrderedDict})
CONTAINERS = (dict, list, tuple, set, frozenset)
DEPTH = 3
MOST = 256
"""Items of a container that are looked at; longer ones are tables, which nobody changes between two calls."""
SAMPLE = 8
OF_CALLS = ("_forward_hooks", "_forward_pre_hooks")
"""Of the model itself: they run around its forward, which is what is put off."""
MEMBERS = frozenset({"_parameters", "_buffers", "_modules"})


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


class ModelState:
    """What a model is now, to see later whether somebody has changed it.

    Small values count by value, other objects by which they are, tensors by
    their version as well, and weights by a few of their values: a write to
    `weight.data` leaves no other trace.
    """

    def __init__(self, module: nn.Module) -> None:
        self._kept: list[Any] = []  # an id says which object it is only while that lives
        self._weights: list[Tensor] = []
        self._parts = self._of_parts(module)
        self._values = _samples(self._weights)

    def changed(self, now: ModelState) -> str:
        """The name of something that is another one in `now`; "" if there is nothing."""
        if self._parts != now._parts:
            return self._differing(now)
        with outside():
            same = self._values.keys() == now._values.keys() and all(
                torch.equal(values, now._values[kind]) for kind, values in self._values.items()
            )
        return "" if same else "values of weights"

    def _differing(self, now: ModelState) -> str:
        for name in [*self._parts, *now._parts]:
            own, other = self._parts.get(name, {}), now._parts.get(name, {})
            for key in [*own, *other]:
                if own.get(key, ...) != other.get(key, ...):
                    return f"{name}.{key}".lstrip(".")
        return "its submodules"

    def _of_parts(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = {}
        waiting, seen = [("", module)], set()
        while waiting:
            name, part = waiting.pop()
            if part in seen:
                continue
            seen.add(part)
            # Most of what a module has are dicts of hooks that are empty, and this is to take no time.
            parts[name] = {
                key: value if type(value) in SMALL else self._fact(value, DEPTH)
                for key, value in vars(part).items()
                if (type(value) not in DICTS or value) and key not in MEMBERS
            }
            for members in (part._parameters, part._buffers):
                if members:
                    parts[name].update({key: self._of_weight(weight) for key, weight in members.items()})
            if part._modules:
                parts[name].update({key: id(child) for key, child in part._modules.items()})
                waiting += [(f"{name}.{key}", child) for key, child in part._modules.items() if child is not None]
        for key in OF_CALLS:
            parts[""].pop(key, None)
        self._kept += seen
        return parts

    def _of_weight(self, weight: Tensor | None) -> Any:
        if weight is None:
            return None
        self._weights.append(weight)
        return id(weight), version(weight)

    def _fact(self, value: Any, depth: int) -> Any:
        """What counts about a value."""
        if type(value) in SMALL:
            return value
        if isinstance(value, CONTAINERS):
            return self._of_items(value, depth)
        self._kept.append(value)
        if isinstance(value, Tensor):
            return id(value), version(value)
        if isinstance(value, nn.Module):
            return id(value)
        inner = getattr(value, "__dict__", None)
        if type(inner) is dict and inner and depth:
            return id(value), self._of_items(inner, 1)
        return id(value)

    def _of_items(self, items: Any, depth: int) -> Any:
        if not items:
            return type(items)
        if not depth or len(items) > MOST:
            self._kept.append(items)
            return id(items), len(items)
        if isinstance(items, dict):
            return {key: self._fact(item, depth - 1) for key, item in items.items()}
        if isinstance(items, (list, tuple)):
            return [self._fact(item, depth - 1) for item in items]
        return frozenset(self._hashable(item) for item in items)

    def _hashable(self, item: Any) -> Any:
        return item if type(item) in SMALL else self._fact(item, 0)


def version(tensor: Tensor) -> int:
    """How often it has been written to."""
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode, where nothing keeps count
        return 0


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and not tensor.is_meta


def _samples(weights: list[Tensor]) -> dict[Kind, Tensor]:
    """The first values of every weight, as bytes: those of each device and dtype in one tensor."""
    of_kind: dict[Kind, list[Tensor]] = {}
    with outside(), torch.no_grad():
        for weight in (rank_values(weight)[0] for weight in weights):
            if _is_plain(weight) and weight.numel() and weight.layout == torch.strided:
                first = weight.as_strided((min(SAMPLE, weight.numel()) if weight.is_contiguous() else 1,), (1,))
                of_kind.setdefault((weight.device, weight.dtype), []).append(first)
        return {kind: torch.cat(firsts).view(torch.uint8) for kind, firsts in of_kind.items()}
