"""Cuts and joins whose rows have not been read yet.

A transformer joins text and image for query, for key and for value, and cuts
apart what its next block joins again. So rows do not move when they are cut or
joined, but when an operation reads them: all rows that wait are then sent
together, in one exchange, and rows that were cut only to be joined again do not
move at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from meshdiff.autoshard.recorder import Line, Recorder, calling_line
from meshdiff.autoshard.reshard import SourceSlice, exchange_into, nothing_moves, plan_of, unfilled

__all__ = ["LazyReshards"]


@dataclass(frozen=True)
class Rows:
    """Rows of a DTensor; zeros if it is None."""

    source: DTensor | None
    start: int
    stop: int


@dataclass(frozen=True)
class LazyReshard:
    """A DTensor that has its memory, and the rows that are to go there along `dim`."""

    output: weakref.ref[DTensor]
    rows: tuple[Rows, ...]
    dim: int
    line: Line | None


class LazyReshards:
    """The DTensors that wait for their rows.

    Before an operation reads a DTensor, or writes to any tensor, the rows have to
    move: `materialize`, `materialize_all`. All ranks run the same program and count
    references alike, so they agree on what waits.

    Attributes:
        recorder: gets the line of the model that moves them.
    """

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self._waiting: dict[int, LazyReshard] = {}
        self._used: set[int] = set()  # ids of those that others were made of, so that nobody may want them any more

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __contains__(self, tensor: Any) -> bool:
        wait = self._waiting.get(id(tensor))
        return wait is not None and wait.output() is tensor  # else another one had this id

    def reshard(
        self,
        sources: Sequence[DTensor],
        outputs: Sequence[Sequence[SourceSlice]],
        dim: int,
        stride: tuple[int, ...] | None = None,
    ) -> list[DTensor]:
        """As `reshard.reshard`, later; `stride` is that of the outputs on one device, if not contiguous."""
        line = calling_line() if self.recorder is not None else None
        made = []
        for pieces in outputs:
            rows = _merged([row for piece in pieces for row in self._rows(sources, piece)])
            zeros = any(own.source is None for own in rows)
            output = unfilled(sources[0], sum(map(len, pieces)), zeros, dim, stride)
            self._waiting[id(output)] = LazyReshard(weakref.ref(output, self._forget), tuple(rows), dim, line)
            self._used.discard(id(output))
            made.append(output)
        return made

    def _rows(self, sources: Sequence[DTensor], piece: SourceSlice) -> list[Rows]:
        """The place of the rows of a piece; for a source that waits itself, the place that its rows come from."""
        if piece.source is None:
            return [Rows(None, piece.start, piece.stop)]
        source = sources[piece.source]
        if source not in self:
            return [Rows(source, piece.start, piece.stop)]
        self.use(source)
        found, at = [], 0
        for rows in self._waiting[id(source)].rows:
            start, stop = max(piece.start - at, 0), min(piece.stop - at, rows.stop - rows.start)
            if start < stop:
                found.append(Rows(rows.source, rows.start + start, rows.start + stop))
            at += rows.stop - rows.start
        return found

    def parts(self, tensor: Any) -> tuple[DTensor, ...] | None:
        """The DTensors that a DTensor that waits joins; None if it does not wait, or is no join of full DTensors."""
        if tensor not in self:
            return None
        wait = self._waiting[id(tensor)]
        parts = tuple(
            own.source
            for own in wait.rows
            if own.source is not None and (own.start, own.stop) == (0, own.source.shape[wait.dim])
        )
        return parts if len(parts) == len(wait.rows) > 1 else None

    def padded(self, tensor: Tensor) -> tuple[DTensor, int] | None:
        """The full DTensor around which one that waits has zeros, and their number before it; None if it is no such."""
        if tensor not in self:
            return None
        wait = self._waiting[id(tensor)]
        first, rows = wait.rows[0], next((rows for rows in wait.rows if rows.source is not None), wait.rows[0])
        source = rows.source
        if source is None or source in self or sum(other.source is not None for other in wait.rows) > 1:
            return None
        if (rows.start, rows.stop) != (0, source.shape[wait.dim]) or not source.placements[0].is_shard(wait.dim):
            return None
        self.use(tensor)
        return source, first.stop - first.start if first.source is None else 0

    def redirect(self, tensor: Tensor, parts: Sequence[DTensor]) -> None:
        """Have a join wait for copies of its parts."""
        wait = self._waiting[id(tensor)]
        rows = tuple(Rows(part, 0, part.shape[wait.dim]) for part in parts)
        self._waiting[id(tensor)] = replace(wait, rows=rows)

    def _forget(self, output: weakref.ref[DTensor]) -> None:
        """Drop a DTensor that is not in use any more, and the rows kept for it."""
        for key in [key for key, wait in self._waiting.items() if wait.output is output]:
            del self._waiting[key]

    def use(self, tensor: Tensor) -> None:
        """Note that something was made of what a DTensor waits for."""
        self._used.add(id(tensor))

    def materialize(self, tensors: Iterable[DTensor]) -> None:
        """Let the rows move of these; and if any have to, with them those of others that were not used otherwise."""
        looked_at = {id(tensor) for tensor in tensors if tensor in self}
        if any(_moves(self._waiting[key]) for key in looked_at):
            looked_at |= self._waiting.keys() - self._used
        self._materialize([key for key in self._waiting if key in looked_at])

    def materialize_all(self) -> None:
        """Let the rows move of all."""
        self._materialize(list(self._waiting))

    def _materialize(self, keys: Sequence[int]) -> None:
        taken = [self._waiting.pop(key) for key in keys]
        waiting = [(wait, output) for wait in taken if (output := wait.output()) is not None]
        together: dict[Any, list[tuple[LazyReshard, DTensor]]] = {}
        for wait, output in waiting:
            others = (*output.shape[: wait.dim], *output.shape[wait.dim + 1 :])
            together.setdefault((wait.dim, others, output.dtype), []).append((wait, output))
        for (dim, *_), group in together.items():
            if self.recorder is not None:
                self.recorder.line = group[0][0].line
            _exchange([wait.rows for wait, _ in group], [output for _, output in group], dim)
            if self.recorder is not None:
                self.recorder.line = None


def _merged(rows: Sequence[Rows]) -> list[Rows]:
    """Rows that follow each other in one source as one, without those that are none."""
    merged: list[Rows] = []
    for own in (own for own in rows if own.start < own.stop):
        last = merged[-1] if merged else None
        if last is not None and last.source is own.source and (own.source is None or last.stop == own.start):
            merged[-1] = Rows(last.source, last.start, last.stop + own.stop - own.start)
        else:
            merged.append(own)
    return merged


def _moves(wait: LazyReshard) -> bool:
    """True if any rank needs rows of another."""
    sources, pieces = _as_pieces([wait.rows])
    return bool(sources) and not nothing_moves(plan_of(sources, pieces, wait.dim))


def _exchange(rows: Sequence[Sequence[Rows]], outputs: Sequence[DTensor], dim: int) -> None:
    sources, pieces = _as_pieces(rows)
    if sources:
        exchange_into(sources, pieces, dim, outputs)


def _as_pieces(rows: Sequence[Sequence[Rows]]) -> tuple[list[DTensor], list[list[SourceSlice]]]:
    """The sources, each once, and for each output its pieces of them."""
    sources = {id(own.source): own.source for part in rows for own in part if own.source is not None}
    places = {key: place for place, key in enumerate(sources)}
    return list(sources.values()), [
        [SourceSlice(places.get(id(own.source)), own.start, own.stop) for own in part] for part in rows
    ]
