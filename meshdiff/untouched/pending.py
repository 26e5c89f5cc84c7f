"""Cuts and joins that nobody has looked at yet.

A transformer joins text and image for query, for key and for value, and cuts
apart what its next block joins again. So rows do not move when they are cut or
joined, but when somebody looks at them: what waits then travels together, in
one exchange, and of what was cut only to be joined again nothing moves.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.tensor import DTensor

from meshdiff.untouched.recorder import Line, Recorder, calling_line
from meshdiff.untouched.rows import Piece, move, unfilled

__all__ = ["Pending"]


@dataclass(frozen=True)
class Rows:
    """Rows of a DTensor; zeros if it is None."""

    source: DTensor | None
    start: int
    stop: int


@dataclass(frozen=True)
class Wait:
    """A DTensor that has its memory, and the rows that are to go there along `dim`."""

    output: weakref.ref[DTensor]
    rows: tuple[Rows, ...]
    dim: int
    line: Line | None


class Pending:
    """The DTensors of one call that wait for their rows.

    Whoever looks at a DTensor, or writes to anything, asks before. All ranks
    run the same program and count references alike, so they agree on what waits.

    Args:
        recorder: is told which line of the model moves them.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self._waiting: dict[int, Wait] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, tensor: Any) -> bool:
        wait = self._waiting.get(id(tensor))
        return wait is not None and wait.output() is tensor  # else another one had this id

    def rearrange(
        self,
        sources: Sequence[DTensor],
        outputs: Sequence[Sequence[Piece]],
        dim: int,
        stride: tuple[int, ...] | None = None,
    ) -> list[DTensor]:
        """As `rows.rearrange`, later; `stride` is that of the outputs on one device, if not contiguous."""
        line = calling_line() if self.recorder is not None else None
        made = []
        for pieces in outputs:
            rows = _merged([row for piece in pieces for row in self._rows(sources, piece)])
            zeros = any(own.source is None for own in rows)
            output = unfilled(sources[0], sum(map(len, pieces)), zeros, dim, stride)
            self._waiting[id(output)] = Wait(weakref.ref(output), tuple(rows), dim, line)
            made.append(output)
        return made

    def _rows(self, sources: Sequence[DTensor], piece: Piece) -> list[Rows]:
        """Where the rows of a piece are: where those come from that wait themselves."""
        if piece.source is None:
            return [Rows(None, piece.start, piece.stop)]
        source = sources[piece.source]
        if source not in self:
            return [Rows(source, piece.start, piece.stop)]
        found, at = [], 0
        for rows in self._waiting[id(source)].rows:
            start, stop = max(piece.start - at, 0), min(piece.stop - at, rows.stop - rows.start)
            if start < stop:
                found.append(Rows(rows.source, rows.start + start, rows.start + stop))
            at += rows.stop - rows.start
        return found

    def settle(self) -> None:
        """Let the rows move that are still wanted."""
        waiting = [(wait, output) for wait in self._waiting.values() if (output := wait.output()) is not None]
        self._waiting.clear()
        together: dict[Any, list[tuple[Wait, DTensor]]] = {}
        for wait, output in waiting:
            others = (*output.shape[: wait.dim], *output.shape[wait.dim + 1 :])
            together.setdefault((wait.dim, others, output.dtype), []).append((wait, output))
        for (dim, *_), group in together.items():
            if self.recorder is not None:
                self.recorder.line = group[0][0].line
            _move([wait.rows for wait, _ in group], [output for _, output in group], dim)
            if self.recorder is not None:
                self.recorder.line = None


def _merged(rows: Sequence[Rows]) -> list[Rows]:
    """Rows that follow each other in one source as one."""
    merged: list[Rows] = []
    for own in rows:
        last = merged[-1] if merged else None
        if last is not None and last.source is own.source and (own.source is None or last.stop == own.start):
            merged[-1] = Rows(last.source, last.start, last.stop + own.stop - own.start)
        else:
            merged.append(own)
    return merged


def _move(rows: Sequence[Sequence[Rows]], outputs: Sequence[DTensor], dim: int) -> None:
    sources: dict[int, DTensor] = {
        id(own.source): own.source for part in rows for own in part if own.source is not None
    }
    places = {key: place for place, key in enumerate(sources)}
    pieces = [[Piece(places.get(id(own.source)), own.start, own.stop) for own in part] for part in rows]
    if sources:
        move(list(sources.values()), pieces, dim, outputs)
