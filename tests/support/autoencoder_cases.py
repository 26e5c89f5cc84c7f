"""Tiny autoencoders of diffusers, whose rows are shared by the ranks of a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from experiments.tiny_models.autoencoders import AUTOENCODERS
from meshdiff import CommsCounter, Layout, init_mesh, parallelize
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.simulation import outside, unwrap

HEIGHT = -2


@dataclass(frozen=True)
class Outcome:
    """The outcome of three calls of a decoder or an encoder.

    Attributes:
        error: the largest relative error of them.
        share: the part of its work that ran on shards.
        replicated: functions and kinds of blocks that ran on replicated tensors.
        sent: traffic of the last one.
    """

    error: float
    share: float
    replicated: list[str]
    sent: dict[str, Any]


def outcomes(name: str, mesh: Any) -> dict[str, Outcome]:
    """Decode and encode on one device, then on a mesh."""
    tiny, found = AUTOENCODERS[name], {}
    with outside():
        model = tiny.build()
        expected = {"decoder": tiny.decode(model), "encoder": tiny.encode(model)}
    for part, run in (("decoder", tiny.decode), ("encoder", tiny.encode)):
        parallel = parallelize(getattr(model, part), mesh, dim=HEIGHT)
        errors = [difference(unwrap(run(model)), expected[part]) for _ in range(2)]
        with CommsCounter(mesh) as comms:
            errors.append(difference(unwrap(run(model)), expected[part]))
        report = parallel.report()
        replicated = [*report.replicated_kinds, *(row["function"] for row in report.gathers())]
        found[part] = Outcome(max(errors), report.sharded_share, replicated, comms.as_dict()["cp"])
        parallel.remove()
    return found


def on_ranks() -> list[dict[str, dict[str, Outcome]]]:
    """The outcomes of all on all ranks of this world, of every rank."""
    mesh = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"]
    return all_gather_object({name: outcomes(name, mesh) for name in AUTOENCODERS})
