"""What a parallel call did, as text that a person reads and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.untouched.recorder import BlockRecord, Recorder

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What the ranks of a mesh shared out of one call, and sent for it.

    Attributes:
        model: the class of the model.
        ranks: how many ranks shared it.
        blocks: what each block did; the first is what happened outside of blocks.
        whole: kinds of blocks that ran on whole tensors, and why; "" is all of the model.
    """

    model: str
    ranks: int
    blocks: tuple[BlockRecord, ...]
    whole: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module, mesh: DeviceMesh, recorder: Recorder, whole: dict[str, str]) -> Report:
        return cls(type(module).__name__, mesh.size(), tuple(recorder.blocks.values()), dict(whole))

    @property
    def sharded_share(self) -> float:
        """The part of the floating point operations that ranks shared out, from 0 to 1."""
        sharded = sum(block.flops_sharded for block in self.blocks)
        return sharded / max(1, sharded + sum(block.flops_replicated for block in self.blocks))

    def table(self) -> list[dict[str, Any]]:
        """A row for each block."""
        return [_row(block) for block in self.blocks]

    def __str__(self) -> str:
        return "\n".join(f"{row}" for row in self.table())


def _row(block: BlockRecord) -> dict[str, Any]:
    total = block.flops_sharded + block.flops_replicated
    collectives: dict[str, int] = {}
    for (collective, _), sent in block.sent.items():
        collectives[collective] = collectives.get(collective, 0) + sent.count
    return {
        "block": block.name or "(outside)",
        "kind": block.kind,
        "sharded": block.flops_sharded / max(1, total),
        "operations": sum(block.sharded.values()),
        "on whole tensors": sum(block.replicated.values()),
        "collectives": collectives,
        "bytes": sum(sent.bytes for sent in block.sent.values()),
        "gathers": [f"{name} at {line}: {why}" for name, why, line in block.gathers],
    }
