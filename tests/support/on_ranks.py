"""Checks that run on real ranks, for `ranks.run_on_ranks`: functions that every rank calls, in a world of all."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch
import torch.distributed as dist
from attention_cases import CASES, JOINT, Case, attend, attend_jointly, fits
from plain_model import on_all_ways
from tiny import make
from torch.distributed.tensor import DTensor, Replicate, Shard

from meshdiff import InputError, Layout, MeshAttention, mesh_attention
from meshdiff.cli import run
from meshdiff.distributed.consensus import agreed, all_gather_object, check_same
from meshdiff.distributed.mesh import init_mesh, place


def command(flags: list[str]) -> NoReturn:
    """`meshdiff run`, which forms a world itself."""
    sys.exit(run.command(flags))


def layouts() -> dict:
    """A clip on every layout of this world, and every rank's traffic."""
    world = dist.get_world_size()
    results = {}
    for cfg in (1, 2, 3):
        if world % cfg == 0 and (world < 8 or cfg == 2) and cfg <= world:
            layout = Layout(cfg, world // cfg)
            video, comms = make(layout, 3 if cfg == 3 else 2)
            results[str(layout)] = video, all_gather_object(comms)
    return results


def hybrid() -> tuple:
    """A clip by the hybrid strategy, the sequence divided by all ranks, and every rank's traffic."""
    video, comms = make(Layout(1, dist.get_world_size()), 2, strategy="hybrid")
    return video, all_gather_object(comms)


def compiled() -> tuple:
    """A clip of compiled blocks, the sequence divided by all ranks, and every rank's traffic."""
    video, comms = make(Layout(1, dist.get_world_size()), 2, compile=True)
    return video, all_gather_object(comms)


def attention() -> dict:
    """Output, gradients and every rank's traffic of every case; outputs and gradients of joint ones."""
    mesh = init_mesh(Layout(1, dist.get_world_size()), "cpu")["cp"]
    results = {}
    for case in CASES:
        if fits(case, mesh.size()):
            values, comms = attend(case, mesh)
            results[case] = values, all_gather_object(comms)
    return results | {case: attend_jointly(case, mesh) for case in JOINT}


def compiled_attention() -> list[bool]:
    """For each strategy, True if it gives the same bits when it is compiled without a graph break."""
    mesh = init_mesh(Layout(1, dist.get_world_size()), "cpu")["cp"]
    same = []
    for strategy, is_causal in (("ulysses", False), ("gather", True)):
        torch._dynamo.reset()
        case = Case(33, 5, batch=2, strategy=strategy)  # that 2 ranks divide neither
        *inputs, gradient = (place(tensor, mesh, [Shard(1)]) for tensor in case.tensors())
        plain = MeshAttention(strategy=strategy, is_causal=is_causal)
        outcomes = []
        for attention in (plain, torch.compile(plain, fullgraph=True)):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            output = attention(*leaves)
            output.backward(gradient)
            outcomes.append([output.full_tensor(), *(leaf.grad.full_tensor() for leaf in leaves)])
        same.append(all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True)))
    return same


def checked_attention() -> list[str]:
    """The errors of every rank with MESHDIFF_CHECK=1 when rank 1 alone holds something else."""
    os.environ["MESHDIFF_CHECK"] = "1"
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_mesh(Layout(1, world), "cpu")["cp"]
    x = torch.randn(1, 6 * world, 4, 8, generator=torch.Generator().manual_seed(0))
    sharded = place(x, mesh, [Shard(1)])
    guessed = DTensor.from_local(x[:, : 5 if rank else 6], mesh, [Shard(1)], run_check=False)
    other = place(x + (rank == 1), mesh, [Replicate()])
    mask = torch.ones(6 * world, dtype=torch.bool)
    mask[0] = rank != 1
    half = place(x.bfloat16(), mesh, [Shard(1)])
    own = sharded.to_local()[:, :, : 2 if rank == 1 else 4]
    fewer_heads = DTensor.from_local(own, mesh, [Shard(1)], run_check=False, shape=x.shape, stride=x.stride())
    heard = []
    for arguments, options in (
        ((guessed, guessed, guessed), {}),
        ((sharded, other, other), {}),
        ((sharded, sharded, sharded), {"attn_mask": mask}),
        ((sharded, sharded, sharded), {"scale": 1.0 + (rank == 1)}),
        ((sharded, half if rank == 1 else sharded, sharded), {}),
        ((sharded, sharded, sharded), {"attn_mask": None if rank else mask}),
        ((fewer_heads, sharded, sharded), {}),
    ):
        try:
            mesh_attention(*arguments, **options)
        except ValueError as error:
            heard.append(str(error))
    mesh_attention(sharded, sharded, sharded)
    return all_gather_object(heard)


def drop_in() -> dict:
    """An untouched model's output and gradient, by each way of dropping mesh attention in."""
    mesh = init_mesh(Layout(1, dist.get_world_size()), "cpu")["cp"]
    return on_all_ways(
        mesh, gather=lambda shard: torch.cat(all_gather_object(shard), dim=1), whole=lambda tensor: tensor
    )


def agreement() -> list[str]:
    """The errors of every rank when one rank fails, and when ranks differ."""
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
    try:
        all_gather_object(rank, None, "the end" if rank == 1 else "the beginning")
    except RuntimeError as error:
        heard.append(str(error).partition(";")[0])
    return all_gather_object(heard)
