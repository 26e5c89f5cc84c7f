"""Models that keep something between calls, and a sampler that calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KEPT: dict[int, int] = {}
STEPS = 6
X = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
CACHE = torch.zeros(2, STEPS, 4)


class Plain(nn.Module):
    """Scales what it is given; the variants below keep something to do that with."""

    shared: dict[str, int]
    begins = 0
    """The call from which on it keeps something."""

    def __init__(self) -> None:
        super().__init__()
        type(self).shared = {}
        self.calls, self.average, self.kept = 0, nn.Buffer(torch.zeros(())), {}
        self.tables: dict[int, Tensor] = {}
        KEPT.clear()

    def forward(self, hidden_states: Tensor, cache: Tensor | None = None, at: int = 0) -> tuple[Tensor]:
        return (hidden_states * 2,)


class Counter(Plain):
    def forward(self, hidden_states):
        self.calls += 1
        return (hidden_states * self.calls,)


class Cache(Plain):
    """Every third call of each branch is computed, others return what that one gave."""

    def forward(self, hidden_states):
        number, self.calls = self.calls, self.calls + 1
        if number // 2 % 3 == 0:
            self.kept[number % 2] = hidden_states * 2
        return (self.kept[number % 2].clone(),)


class Average(Plain):
    """Written in place."""

    def forward(self, hidden_states):
        self.average.mul_(0.5).add_(hidden_states.mean())
        return (hidden_states + self.average,)


class Residual(Plain):
    """The last one, whoever it was of; nothing at first."""

    last: Tensor | None = None

    def forward(self, hidden_states):
        before, self.last = self.last, hidden_states.clone()
        return (hidden_states if before is None else hidden_states + before,)


class OfClass(Plain):
    def forward(self, hidden_states):
        self.shared["calls"] = self.shared.get("calls", 0) + 1
        return (hidden_states * self.shared["calls"],)


class Global(Plain):
    """By id, in a dict that is nobody's."""

    def forward(self, hidden_states):
        return (hidden_states * count(self),)


def count(model: nn.Module) -> int:
    KEPT[id(model)] = KEPT.get(id(model), 0) + 1
    return KEPT[id(model)]


class Table(Plain):
    """No state: what it keeps is the same whoever makes it."""

    def forward(self, hidden_states):
        length = hidden_states.shape[1]
        if length not in self.tables:
            self.tables[length] = torch.arange(length).float().view(1, -1, 1)
        return (hidden_states + self.tables[length],)


def patched(model: Plain) -> None:
    """A forward that counts in a variable that it encloses."""
    forward, calls = model.forward, 0

    def counting(hidden_states):
        nonlocal calls
        calls += 1
        return (forward(hidden_states)[0] * calls,)

    model.forward = counting


def hooked(model: Plain) -> None:
    """A hook of an object that counts, on a part."""

    class Hook:
        calls = 0

        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.calls += 1
            return output * self.calls

    model.part = nn.Identity()
    model.part.register_forward_hook(Hook())
    own = model.forward
    model.forward = lambda hidden_states: (model.part(own(hidden_states)[0]),)


class Late(Plain):
    """Begins to count at its eighth call, when calls are divided; not seen before is what it counts with."""

    def forward(self, hidden_states):
        if hidden_states.abs().max() > 100:
            self.calls += 1
        return (hidden_states * (1 + self.calls),)


def build(kind: Any) -> Plain:
    if isinstance(kind, type):
        return kind()
    model = Plain()
    kind(model)
    return model


def clip(model: nn.Module, batch: int, scale: float = 1.0) -> Tensor:
    """Steps of a sampler: two calls each, or one of a batch of two."""
    x, total = X[0][:1], torch.zeros(1, 5, 4)
    for step in range(STEPS):
        scale = scale * (200 if step == 4 else 1)
        branches = (x + step) * scale, (x - step) * scale
        if batch == 1:
            first, second = (model(hidden_states=branch)[0] for branch in branches)
        else:
            first, second = model(hidden_states=torch.cat(branches))[0].chunk(2)
        total = total + first + 3 * (second - first)
    return total
