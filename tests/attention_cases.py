"""Attention cases that the simulation and real ranks both run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from meshdiff import CommsCounter, mesh_attention
from meshdiff.mesh import place
from meshdiff.simulation import on_each_rank, unwrap


@dataclass(frozen=True)
class Case:
    """Shapes of query `[batch, seq, heads, head_dim]` and, for cross-attention, the length of the text."""

    batch: int
    seq: int
    heads: int
    head_dim: int
    text: int | None = None

    @property
    def self_attention(self) -> bool:
        return self.text is None

    def tensors(self) -> list[torch.Tensor]:
        """Query, key, value and the gradient of the output."""
        return list(_draw(self.batch, self.seq, self.text or self.seq, self.heads, self.head_dim))


@on_each_rank  # or simulated ranks would take turns with the generator
def _draw(batch: int, seq: int, other: int, heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seq)
    return tuple(torch.randn(batch, n, heads, head_dim, generator=generator) for n in (seq, other, other, seq))


# Sequences and heads that 2, 3 and 4 ranks do and do not divide; fewer heads than ranks; more than one in a batch.
CASES = [Case(1, 48, 12, 8), Case(2, 61, 8, 8), Case(3, 10, 3, 16), Case(1, 33, 1, 8), Case(2, 29, 6, 8, text=5)]


def reference(case: Case) -> list[torch.Tensor]:
    """Output and gradients on one device."""
    query, key, value, gradient = case.tensors()
    inputs = [t.requires_grad_() for t in (query, key, value)]
    output = mesh_attention(*inputs)
    output.backward(gradient)
    return [output.detach(), *(t.grad for t in inputs)]


def attend(case: Case, mesh: DeviceMesh) -> tuple[list[torch.Tensor], dict]:
    """Output and gradients on a 1-D mesh, and what the forward and backward pass sent."""
    query, key, value, gradient = case.tensors()
    other = Shard(1) if case.self_attention else Replicate()
    placements = [Shard(1), other, other]
    inputs = [place(t, mesh, [p]).requires_grad_() for t, p in zip((query, key, value), placements, strict=True)]
    with CommsCounter(mesh) as comms:
        output = mesh_attention(*inputs)
        forward = comms.as_dict()
        output.backward(place(gradient, mesh, [Shard(1)]))
        both = comms.as_dict()
    assert output.placements == (Shard(1),)
    values = [unwrap(t.full_tensor()).detach() for t in (output, *(i.grad for i in inputs))]
    return values, {"forward": forward, "both": both}
