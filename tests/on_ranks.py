"""The half of the tests that runs inside real ranks; started by `ranks.run_on_ranks`.

A check is a function that every rank calls; what it returns on rank 0 is saved.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from attention_cases import CASES, attend
from tiny import make

from meshdiff import InputError, Layout
from meshdiff.agreement import agreed, check_same, from_every_rank
from meshdiff.launch import end_process
from meshdiff.mesh import init_distributed, init_mesh


def layouts() -> dict:
    """A clip on every layout of this world, and every rank's traffic."""
    world = dist.get_world_size()
    results = {}
    for cfg in (1, 2, 3):
        if world % cfg == 0 and (world < 8 or cfg == 2) and cfg <= world:
            layout = Layout(cfg, world // cfg)
            video, comms = make(layout, 3 if cfg == 3 else 2)
            results[str(layout)] = video, from_every_rank(comms)
    return results


def compiled() -> tuple:
    """A clip of compiled blocks, the sequence divided by all ranks, and every rank's traffic."""
    video, comms = make(Layout(1, dist.get_world_size()), 2, compile=True)
    return video, from_every_rank(comms)


def attention() -> list:
    """Output, gradients and traffic of every case."""
    mesh = init_mesh(Layout(1, dist.get_world_size()), "cpu")["cp"]
    results = []
    for case in CASES:
        values, comms = attend(case, mesh)
        results.append((values, from_every_rank(comms)))
    return results


def agreement() -> list[str]:
    """What every rank hears when one rank fails, and when ranks differ."""
    heard = []
    rank = dist.get_rank()
    try:
        with agreed():
            if rank == 1:
                raise InputError("--weights", "no such file")
    except InputError as error:
        heard.append(str(error))
    try:
        check_same({"--seed": rank, "--cp": 1})
    except InputError as error:
        heard.append(str(error))
    with agreed():
        pass
    return from_every_rank(heard)


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed()
    outcome = {"layouts": layouts, "compiled": compiled, "attention": attention, "agreement": agreement}[sys.argv[1]]()
    if dist.get_rank() == 0:
        torch.save(outcome, sys.argv[2])
    dist.destroy_process_group()
    end_process(0)
