"""Many requests on a mesh with replicas: their division between replicas, and the record of those that are done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.cli.output import COMPLETE, remove_partial
from meshdiff.cli.request_list import Entry
from meshdiff.diffusion.request import Request
from meshdiff.distributed.consensus import all_gather_object, is_first_rank, store
from meshdiff.distributed.mesh import replica
from meshdiff.errors import InputError

__all__ = ["RESULTS", "Counter", "Record", "check_alike", "fresh", "resume", "take_turns"]

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Record:
    """A line of `results.jsonl`."""

    line: int
    """Line number in the list of requests."""
    name: str
    status: str
    """"ok", or "failed"."""
    error: str | None = None
    seconds: float | None = None
    """Seconds from prompt to frames."""
    replica: int | None = None
    """Index of the replica that did it."""

    def append(self, folder: Path) -> None:
        """Append the line to the file in one write, so that replicas do not write into each other's lines."""
        line = (json.dumps(asdict(self)) + "\n").encode()
        descriptor = os.open(folder / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


class Counter:
    """A number that all ranks share and each can increase; no rank waits for another."""

    def __init__(self, name: str) -> None:
        self.name = f"meshdiff/{name}"
        self._alone = 0

    def add(self, amount: int) -> int:
        """Add to the number, and return its new value."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            return store().add(self.name, amount)
        self._alone += amount
        return self._alone


def take_turns(mesh: DeviceMesh, count: int, counter: Counter) -> Iterator[int]:
    """The items, of `count`, that this rank's replica does: each takes the next one when it is free.

    All ranks of a replica get the same; a collective among them, and among them only.
    """
    own = replica(mesh)
    while True:
        item = counter.add(1) - 1 if is_first_rank(own) else 0
        item = all_gather_object(item, own)[0]
        if item >= count:
            return
        yield item


def resume(
    folder: Path,
    requests: Mapping[Entry, Request],
    model: Mapping[str, Any] | None = None,
    inputs: Callable[[Request], Mapping[str, str]] | None = None,
) -> list[Entry]:
    """The entries of a list that are still to be done, in a folder where it may have been begun; repairs the record.

    Args:
        folder: the folder of the list.
        requests: the good entries, with nothing left open.
        model: other values that `metrics.json` must have for a clip that is not to be done again.
        inputs: function that returns the digests of the files that a request names, which it must have as well.

    Raises:
        InputError: if a folder holds the clip of another request, or model, under the name of one of these.
    """
    recorded: dict[str, dict[str, Any]] = {}
    if (folder / RESULTS).is_file():
        for line in (folder / RESULTS).read_text(encoding="utf-8", errors="replace").splitlines():
            try:  # the last line may be half a line
                record = json.loads(line)
                recorded[record["name"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    kept, left = [], []
    for entry, request in requests.items():
        remove_partial(folder / entry.name)
        complete = folder / entry.name / COMPLETE
        if not complete.is_file():
            left.append(entry)
            continue
        try:
            metrics = dict(json.loads(complete.read_text(encoding="utf-8")))
            files = {} if inputs is None else {"inputs": inputs(request)}
            # As JSON has it, where a tuple is a list.
            asked = json.loads(json.dumps({**asdict(request), **(model or {}), **files}))
            _check_same(entry, asked, metrics)
            done = Record(
                entry.line, entry.name, "ok", seconds=metrics["seconds_total"], replica=metrics.get("replica")
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("--resume", f"{complete} cannot be read; remove that folder") from error
        before = recorded.get(entry.name, {})
        record = {**before, "line": entry.line} if before.get("status") == "ok" else asdict(done)
        kept.append(json.dumps(record))
    rewritten = folder / f".{RESULTS}"
    rewritten.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    rewritten.replace(folder / RESULTS)
    return left


def check_alike(errors: Mapping[int, str | None]) -> None:
    """Raise `InputError` on every rank if a line of a list can be done on some ranks only; a collective.

    Args:
        errors: the reason why a line cannot be done, None if it can, by its number; the same lines on every rank.
    """
    ranks = all_gather_object(dict(errors))
    for line in errors:
        bad = {rank: of_rank[line] for rank, of_rank in enumerate(ranks) if of_rank[line] is not None}
        if 0 < len(bad) < len(ranks):
            rank, reason = next(iter(bad.items()))
            error = InputError(
                f"line {line} of --prompts", f"is good on other ranks, and on rank {rank} it is not: {reason}"
            )
            error.everywhere = True
            raise error


def _check_same(entry: Entry, asked: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    for key, value in asked.items():
        chosen_by_model = value is None and key in ("frames", "height", "width")
        if not chosen_by_model and metrics.get(key) != value:
            raise InputError(
                "--resume",
                f"{entry.name} was made with {key} {metrics.get(key)!r}, and now {value!r} is asked for; name another "
                "--out, or remove that folder",
            )


def fresh(folder: Path) -> None:
    """Make the folder of a list.

    Raises:
        InputError: if it is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("--out", f"{folder} is not empty; name another folder, or add --resume to go on with it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--out", f"{folder} cannot be made ({error.strerror or error})") from error
