"""The kinds of calls of a model that were used last: each holds megabytes, and there may be any number of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from meshdiff.autoshard.call_key import CallKey

__all__ = ["KINDS", "CallKinds", "NotCaptured"]

KINDS = 16
"""Kinds of calls of one model that are kept."""
PAYS = 8
"""Number of runs of a graph, before its kind is let go, below which it took longer to make than it has saved."""
TOO_SOON = 4
"""Kinds in a row that are let go before that; then no other kinds are begun for a while."""
PAUSE = 256
"""Calls in a pause; each is twice as long as the last. If a number changes at every step, each call is a new kind."""


class NotCaptured(Exception):
    """This call has no graph, for this reason."""


class HasRuns(Protocol):
    """State that is kept for a kind of calls."""

    runs: int
    """Number of times its graph has run."""


K = TypeVar("K", bound=HasRuns)


@dataclass
class CallKinds(Generic[K]):
    """State that is kept for each kind of calls, for at most `KINDS` of them, the one used last at the end.

    All that it decides follows from the kinds of the calls so far, in their order, and from how often graphs have
    run: ranks that are called alike keep the same.

    Attributes:
        make: makes the state of a new kind.
        let_go: number of kinds that have been let go.
        last: the shapes of the inputs of the last of them.
    """

    make: Callable[[], K]
    let_go: int = 0
    last: str = ""
    _kept: OrderedDict[CallKey, K] = field(default_factory=OrderedDict)
    _calls: int = 0
    _too_soon: int = 0
    _paused_until: int = 0
    _pause: int = PAUSE

    def __iter__(self) -> Iterator[K]:
        return iter(self._kept.values())

    def use(self, key: CallKey) -> K:
        """The state that is kept for the kind of a call.

        Raises:
            NotCaptured: if it is a new one, and the last new ones were of no use.
        """
        self._calls += 1
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._calls < self._paused_until:
            raise NotCaptured(
                f"kinds of calls change before a graph has run {PAYS} times; is it given a number that changes?"
            )
        if len(self._kept) == KINDS:
            self._let_go_of_one()
        return self._kept.setdefault(key, self.make())

    def replace(self, new: Callable[[K], K]) -> None:
        """Replace the state that is kept for each kind."""
        for key, kept in self._kept.items():
            self._kept[key] = new(kept)

    def _let_go_of_one(self) -> None:
        key, kept = self._kept.popitem(last=False)
        self.let_go, self.last = self.let_go + 1, key.shapes
        self._too_soon = self._too_soon + 1 if kept.runs < PAYS else 0
        if self._too_soon == TOO_SOON:
            self._too_soon, self._paused_until = 0, self._calls + self._pause
            self._pause *= 2
