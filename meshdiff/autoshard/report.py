"""A report on a parallel call, as text and as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.autoshard.recorder import BlockRecord, Line, Recorder, Sent

__all__ = ["Report", "size_in_words"]

OUTSIDE = "outside of blocks"

WIDTH = 12  # of the bar


@dataclass(frozen=True)
class Report:
    """Report on one call: the work that was sharded over the ranks of a mesh, and what they sent for it.

    Print it for a text; `table`, `sent` and `gathers` return its parts.

    Attributes:
        model: the class of the model.
        ranks: number of ranks of the mesh.
        blocks: a record of each block; the one without a name is of operations outside of blocks.
        replicated_kinds: kinds of blocks that ran on replicated tensors, and why; "" is the full model.
        captured: the result of capturing its calls; "" if that was not requested.
        weights: where they are stored; "" if every rank's device has all of them.
    """

    model: str
    ranks: int
    blocks: tuple[BlockRecord, ...]
    replicated_kinds: dict[str, str]
    captured: str = ""
    weights: str = ""

    @classmethod
    def of(cls, module: nn.Module, mesh: DeviceMesh, recorder: Recorder, replicated_kinds: dict[str, str]) -> Report:
        return cls(type(module).__name__, mesh.size(), tuple(recorder.blocks.values()), dict(replicated_kinds))

    @property
    def sharded_share(self) -> float:
        """The part of the floating point operations that ran on shards, from 0 to 1."""
        return _share(self.blocks)

    @property
    def summary(self) -> str:
        """The share of the work on shards, and what did not run on them, in one line."""
        share = f"{self.model} on {self.ranks} ranks: {_percent(self.sharded_share)} of its operations are sharded"
        kinds = (f"{kind or 'all of it'} runs replicated" for kind in self.replicated_kinds)
        gathers = (f"{row['function']} ({row['line']}) ran on replicated tensors" for row in self.gathers())
        return "; ".join([share, *kinds, *gathers])

    def table(self) -> list[dict[str, Any]]:
        """A row for each block: the part of its work that ran on shards, its operations, what was sent for it."""
        return [_row(block) for block in self.blocks]

    def sent(self) -> list[dict[str, Any]]:
        """A row for each line of code that made ranks send something, most bytes first."""
        lines: dict[tuple[str, Line], Sent] = {}
        for block in self.blocks:
            for key, sent in block.sent.items():
                total = lines.setdefault(key, Sent())
                total.count += sent.count
                total.bytes += sent.bytes
        rows = [
            {"collective": collective, "calls": sent.count, "bytes": sent.bytes, "line": str(line), "code": line.text}
            for (collective, line), sent in lines.items()
        ]
        return sorted(rows, key=lambda row: -row["bytes"])

    def gathers(self) -> list[dict[str, Any]]:
        """A row for each line whose function ran on replicated tensors, though it was given shards, and why."""
        lines: Counter[tuple[str, str, Line]] = Counter()
        for block in self.blocks:
            lines.update(block.gathers)
        return [
            {"function": function, "calls": count, "why": why, "line": str(line), "code": line.text}
            for (function, why, line), count in lines.most_common()
        ]

    def __str__(self) -> str:
        title = f"{self.model} on {self.ranks} ranks: {_percent(self.sharded_share)} of its operations are sharded"
        parts = [title, *filter(None, (self.captured, self.weights)), ""]
        for kind, reason in self.replicated_kinds.items():
            parts += [f"{kind or 'All of it'} runs replicated on every rank: {reason}", ""]
        if self.blocks:
            parts += _columns(
                ["block", "", "sharded", "self-attention", "each rank sends", "in (of one block)"],
                [_line(blocks) for blocks in _alike(self.blocks)],
            )
            parts += ["", "Sent, by line of code"]
            parts += _columns(
                ["", "", "", "", ""],
                [
                    [f"{row['calls']} x", row["collective"], size_in_words(row["bytes"]), row["line"], row["code"][:60]]
                    for row in self.sent()
                ],
            )[1:]
        if self.gathers():
            parts += ["", "On replicated tensors, though given shards"]
            parts += [f"  {row['function']} ({row['line']}): {row['why']}" for row in self.gathers()]
        return "\n".join(line.rstrip() for line in parts)


def _share(blocks: Iterable[BlockRecord]) -> float:
    sharded = sum(block.flops_sharded for block in blocks)
    return sharded / max(1, sharded + sum(block.flops_replicated for block in blocks))


def _row(block: BlockRecord) -> dict[str, Any]:
    return {
        "block": block.name or OUTSIDE,
        "kind": block.kind,
        "sharded": _share([block]),
        "operations on shards": sum(block.sharded.values()),
        "operations on replicated tensors": sum(block.replicated.values()),
        "self-attentions on shards": block.attention_sharded,
        "self-attentions on replicated tensors": block.attention_replicated,
        "collectives": dict(_collectives(block)),
        "bytes": sum(sent.bytes for sent in block.sent.values()),
    }


def _collectives(block: BlockRecord) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (collective, _), sent in block.sent.items():
        counts[collective] += sent.count
    return counts


def _alike(blocks: Sequence[BlockRecord]) -> list[list[BlockRecord]]:
    """Neighbours of one kind that did the same, as one line."""
    groups: list[list[BlockRecord]] = []
    for block in blocks:
        if groups and _facts(groups[-1][-1]) == _facts(block):
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def _facts(block: BlockRecord) -> Any:
    row = _row(block)
    return block.name.rpartition(".")[0], [row[key] for key in row if key != "block" and "operations" not in key]


def _line(blocks: list[BlockRecord]) -> list[str]:
    first, last = blocks[0], blocks[-1]
    name = first.name or OUTSIDE
    if len(blocks) > 1:
        name += f" to {last.name.rpartition('.')[2]}"
    share = _share(blocks)
    total = first.attention_sharded + first.attention_replicated
    attention = f"{first.attention_sharded} of {total} on shards" if total else ""
    sent = sum(sent.bytes for sent in first.sent.values())
    collectives = ", ".join(f"{count} {kind}" for kind, count in _collectives(first).items())
    return [name, first.kind, f"{_bar(share)} {_percent(share):>4}", attention, size_in_words(sent), collectives]


def _percent(share: float) -> str:
    return f"{math.floor(share * 100)}%"  # 100% is to be all of it


def _bar(share: float) -> str:
    full = math.floor(share * WIDTH)
    return "█" * full + "·" * (WIDTH - full)


def size_in_words(number: float) -> str:
    """A number of bytes for a person to read."""
    if not number:
        return "nothing"
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _columns(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    ]
