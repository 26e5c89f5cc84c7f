"""Guidance: the branches of a step side by side on the mesh, one velocity out.

A *branch* is the model's answer to one prompt: the prompt itself, the negative
prompt, and for some methods more. Branches are independent, so the ranks of the
`cfg` dim divide them, and one all-gather brings the answers together.

    x            [1, seq, channels]         on (cfg, cp): (Replicate, Shard(1))
    branches     [branches, seq, channels]                (Shard(0),  Shard(1))   nothing sent
      the model, on mesh["cp"] alone, for this rank's branches
    velocities   [branches, seq, channels]                (Shard(0),  Shard(1))
    gathered     [branches, seq, channels]                (Replicate, Shard(1))   all-gather on cfg
    combined     [1, seq, channels]                       (Replicate, Shard(1))   nothing sent
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.distributed.mesh import on_mesh, place
from meshdiff.distributed.placements import BRANCHES, REPLICATED, SEQUENCE

__all__ = ["Combine", "Denoise", "classifier_free", "divide_branches", "run_branches"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""The model at one time: tokens `[b, seq, channels]` and context `[b, ...]`, on the cp mesh, to velocity."""

Combine = Callable[[Tensor], Tensor]
"""All branches' velocities `[branches, seq, channels]` to one `[1, seq, channels]`, elementwise in tokens."""


def classifier_free(scale: float) -> Combine:
    """`negative + scale * (prompt - negative)`, of branches (prompt, negative prompt).

    Ho & Salimans, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
    """

    def combine(velocities: Tensor) -> Tensor:
        if velocities.shape[0] == 1:
            return velocities
        if velocities.shape[0] != 2:
            raise ValueError(f"classifier-free guidance combines 2 branches, not {velocities.shape[0]}; pass combine=")
        conditional, unconditional = velocities.split(1)
        return unconditional + scale * (conditional - unconditional)

    return combine


def divide_branches(context: Tensor, mesh: DeviceMesh) -> DTensor:
    """Give every cfg rank the context of its branches, once a run; nothing is sent.

    It takes any number of branches on any number of `cfg` ranks: where the ranks
    do not divide the branches, the ranks that would wait run the last branch too.

    Args:
        context: the condition of each branch, a DTensor `[branches, ...]`
            replicated on `mesh["cp"]` and the same on every cfg rank.
        mesh: 2-D, dims ("cfg", "cp").

    Returns:
        `[slots, ...]` placed (Shard(0), Replicate), with as many slots as the
        cfg ranks need to have equally many.
    """
    assert isinstance(context, DTensor)
    branches, ranks = context.shape[0], mesh["cfg"].size()
    slots = -(-branches // ranks) * ranks
    order = [min(slot, branches - 1) for slot in range(slots)]
    return place(context.to_local()[order], mesh, [BRANCHES, REPLICATED])


def run_branches(denoise: Denoise, x: Tensor, context: DTensor, branches: int) -> Tensor:
    """Every branch's velocity for the same tokens.

    Args:
        denoise: the model; it gets this rank's branches only, and no cfg dim.
        x: tokens, a DTensor `[1, seq, channels]` placed (Replicate, Shard(1)) on a ("cfg", "cp") mesh.
        context: from `divide_branches`.
        branches: number of branches.

    Returns:
        Velocities, a DTensor `[branches, seq, channels]` placed (Replicate, Shard(1)).
    """
    assert isinstance(x, DTensor)
    mesh, cp = x.device_mesh, x.device_mesh["cp"]
    slots = context.shape[0]
    own = slots // mesh["cfg"].size()
    # Every cfg rank holds these tokens already: its branches all start from them.
    tokens = on_mesh(x, cp, [SEQUENCE], x.shape).expand(own, -1, -1)
    velocity = denoise(tokens, on_mesh(context, cp, [REPLICATED], (own, *context.shape[1:])))
    velocities = on_mesh(velocity, mesh, [BRANCHES, SEQUENCE], (slots, *velocity.shape[1:]))
    return velocities.redistribute(placements=[REPLICATED, SEQUENCE])[:branches]
