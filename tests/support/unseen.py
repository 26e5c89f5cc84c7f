"""Where tests count what a model does, so that counting is not a change of the model."""

from __future__ import annotations

from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

__all__ = ["unseen"]


def unseen(**held: Any) -> ContextVar[SimpleNamespace]:
    """Attributes, in an object that is made in C and that a snapshot of a model cannot look into."""
    holder: ContextVar[SimpleNamespace] = ContextVar("unseen")
    holder.set(SimpleNamespace(**held))
    return holder
