"""Reads back what the W&B client wrote in offline mode."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


@dataclass
class Log:
    """A W&B run."""

    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))


def read_log(path: Path) -> Log:
    """The run in a `.wandb` file."""
    log = Log()
    for record in _records(path):
        log.name, log.group = record.run.display_name or log.name, record.run.run_group or log.group
        for item in record.run.config.update:
            log.config[item.key] = json.loads(item.value_json)
        for item in record.summary.update:
            log.summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.history.item:
            log.history[item.key or "/".join(item.nested_key)].append(json.loads(item.value_json))
    return log


def _records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """LevelDB's log format, after a header of 7 bytes."""
    data = path.read_bytes()
    position, record = 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # what is left of a block is too small for a header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""
