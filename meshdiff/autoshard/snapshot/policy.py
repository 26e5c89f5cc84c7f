"""Uses of a snapshot, which differ in what of a module counts."""

from __future__ import annotations

from enum import Enum

__all__ = ["Policy"]


class Policy(Enum):
    """Rules for what counts as a change of a module, and for what can be undone.

    Attributes:
        STATE: what a call keeps for the next one. Tensors count by the values that are written to them, random
            generators by their state, as the calls of a guided step are to run in any order. Where weights lie does
            not count, as offloading moves them, nor does the order of dicts, which caches change, nor what objects of
            torch hold, nor the items of long tables.
        RESTORE: the same, with copies of buffers and inputs of any size, so that a call can start again.
        GUARD: what Python reads of a model, as a captured graph has it in it. Tensors count by which they are and how
            they lie in memory: a graph reads their values itself. All else counts that `STATE` does without, and
            `ModuleSnapshot.opaque` names what nothing sees a change of. It is compared at every call, so it reads no
            values and has no copies.
    """

    STATE = "state"
    RESTORE = "restore"
    GUARD = "guard"
