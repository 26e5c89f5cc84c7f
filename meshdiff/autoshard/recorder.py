"""A record of a call: the operations that ran on shards, and what was sent, with the line of code that caused it."""

from __future__ import annotations

import linecache
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.flop_counter import flop_registry

from meshdiff.autoshard.dtensor_utils import is_sharded
from meshdiff.distributed.comms import CommsCounter
from meshdiff.distributed.torch_compat import tree_leaves

__all__ = ["BlockRecord", "Line", "Recorder", "Sent", "calling_line"]

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))


@dataclass(frozen=True)
class Line:
    """A line of source."""

    file: str
    number: int

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.number}"


@dataclass
class Sent:
    """Calls of one collective from one line, and what a rank sent in them."""

    count: int = 0
    bytes: int = 0


@dataclass
class BlockRecord:
    """A record of one block: its operations and what was sent; the name "" is for those outside of blocks."""

    name: str
    kind: str
    sharded: Counter[str] = field(default_factory=Counter)
    replicated: Counter[str] = field(default_factory=Counter)
    flops_sharded: int = 0
    flops_replicated: int = 0
    attention_sharded: int = 0
    attention_replicated: int = 0
    sent: dict[tuple[str, Line], Sent] = field(default_factory=lambda: defaultdict(Sent))
    gathers: dict[tuple[str, str, Line], int] = field(default_factory=lambda: defaultdict(int))


class Recorder(CommsCounter):
    """Counts collectives, with the line that caused each, and operations, by block.

    Args:
        mesh: the mesh whose collectives are counted.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        self.blocks: dict[str, BlockRecord] = {}
        self.line: Line | None = None
        """The line to name as the cause of what is sent; None for the one that is running."""
        self.enter("", "")

    def enter(self, name: str, kind: str) -> None:
        self.current = self.blocks.setdefault(name, BlockRecord(name, kind))

    def count(self, dim: str, collective: str, nbytes: int) -> None:
        super().count(dim, collective, nbytes)
        sent = self.current.sent[collective, self.line or calling_line()]
        sent.count += 1
        sent.bytes += nbytes

    def on_operation(self, func: Any, arguments: Any, result: Any) -> None:
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return
        sharded = any(map(is_sharded, tree_leaves(result)))
        name = func._schema.name.removeprefix("aten::")
        (self.current.sharded if sharded else self.current.replicated)[name] += 1
        of_operation = flop_registry.get(func._overloadpacket)
        if of_operation is not None:
            args, kwargs = arguments
            self._add_flops(of_operation(*args, **kwargs, out_val=result), sharded)

    def on_attention(self, query: Tensor, key: Tensor, sharded: bool) -> None:
        """Note an attention `[..., queries, head_dim]` to `[..., keys, head_dim]`."""
        if sharded:
            self._add_flops(4 * query.numel() * key.shape[-2], sharded)
        if query.shape[-2] == key.shape[-2]:
            if sharded:
                self.current.attention_sharded += 1
            else:
                self.current.attention_replicated += 1

    def on_linear(self, shape: torch.Size, weight: Tensor) -> None:
        """Note a linear layer on shards, which gives `shape`."""
        self.current.sharded["linear"] += 1
        self._add_flops(2 * shape.numel() * weight.shape[1], True)

    def on_function(self, name: str, flops: int = 0) -> None:
        """Note a function on shards that is not made of operations which the guard sees."""
        self.current.sharded[name] += 1
        self._add_flops(flops, True)

    def on_gather(self, function: str, why: str) -> None:
        """Note a function that ran on replicated tensors."""
        self.current.gathers[function, why, calling_line()] += 1

    def _add_flops(self, flops: int, sharded: bool) -> None:
        if sharded:
            self.current.flops_sharded += flops
        else:
            self.current.flops_replicated += flops


def calling_line() -> Line:
    """The line of the model's code that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*LIBRARIES, "<")):
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno)
