"""The half of the tests that runs inside real ranks; started by `ranks.run_on_ranks`.

A check is a function that every rank calls; what it returns on rank 0 is saved.
"""

from __future__ import annotations

import copy
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from attention_cases import CASES, JOINT, Case, attend, attend_jointly, fits
from plain_model import on_all_ways
from tiny import make
from torch.distributed.tensor import DTensor, Replicate, Shard

from meshdiff import InputError, Layout, MeshAttention, mesh_attention
from meshdiff.distributed.consensus import agreed, all_gather_object, check_same
from meshdiff.distributed.launch import end_process
from meshdiff.distributed.mesh import init_distributed, init_mesh, place


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
    """Whether each strategy, compiled without a graph break, gives the bits that it gives otherwise."""
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
    """What every rank hears with MESHDIFF_CHECK=1 when rank 1 alone holds something else."""
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
    try:
        all_gather_object(rank, None, "the end" if rank == 1 else "the beginning")
    except RuntimeError as error:
        heard.append(str(error).partition(";")[0])
    return all_gather_object(heard)


def tiles() -> dict:
    """Every rank's decoded video and traffic, on two layouts of this world."""
    from test_tiles import SIZE, decoded, latents  # brings diffusers, which takes seconds that no other check needs

    world = dist.get_world_size()
    return {
        str(layout): all_gather_object(decoded(layout, latents(*SIZE)))
        for layout in (Layout(2, world // 2), Layout(1, world))
    }


def wan() -> dict:
    """Every rank's clip, traffic and counts, of both versions and of places for weights."""
    from tiny_wan import make

    root, world = Path(sys.argv[2]).parent, dist.get_world_size()
    layout = Layout(2, world // 2) if world % 2 == 0 else Layout(1, world)
    runs = [("2.1", "plain"), ("2.1", "sharded"), ("2.1", "offloaded"), ("2.2", "plain")]
    mesh = init_mesh(layout, "cpu")  # one for all runs: an equal one would send on the groups of the first
    return {run: all_gather_object(make(root, mesh, *run)) for run in runs}


def untouched() -> dict:
    """Models of diffusers on all ranks: see `untouched_cases.of_diffusers`, the traffic of every rank."""
    from untouched_cases import of_diffusers  # brings diffusers

    mesh, results = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], {}
    for name in (
        "WanTransformer3DModel",
        "FluxTransformer2DModel",
        "SD3Transformer2DModel",
        "QwenImageTransformer2DModel",
        "ZImageTransformer2DModel",  # lists in and out
        "HiDreamImageTransformer2DModel",  # experts that are chosen by the data
        "GlmImageTransformer2DModel",  # writes to slices
        "MochiTransformer3DModel",
    ):
        error, share, calls, traffic, whole = of_diffusers(name, mesh)
        results[name] = error, share, calls, all_gather_object(traffic), whole
    return results


def untouched_calls() -> list[tuple[dict, int, int]]:
    """Of every rank: errors of small models called several times; FLOPs of a later call as counted, and as expected."""
    from test_untouched import Joint
    from test_untouched_calls import BODIES, CALLS, Tokens
    from torch.utils.flop_counter import FlopCounterMode

    from meshdiff import parallelize
    from meshdiff.attention.problem import chunk_sizes
    from meshdiff.autoshard.numerics import difference

    mesh, errors = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], {}
    torch.manual_seed(0)
    models = {body.__name__: (Tokens(body), [(hidden,) for hidden in CALLS]) for body in BODIES}
    models |= {
        f"joint {change}": (Joint(change), [(hidden, hidden[:, :5] * 2) for hidden in CALLS])
        for change in ("", "source", "join", "view")
    }
    with torch.no_grad():
        for name, (model, calls) in models.items():
            expected = [copy.deepcopy(model)(*(tensor.clone() for tensor in call)) for call in calls]
            if "cached" in name:  # by one model, from call to call
                alone = copy.deepcopy(model)
                expected = [alone(*call) for call in calls]
            parallel = parallelize(model, mesh)
            found = [parallel(*call) for call in calls]
            errors[name] = max(difference(*pair) for pair in zip(found, expected, strict=True))
        model = Tokens(lambda block, x, y: y)
        parallel = parallelize(model, mesh)
        for (hidden,) in [(hidden,) for hidden in CALLS]:
            with FlopCounterMode(display=False) as counter:
                parallel(hidden)
    batch, length, channels = CALLS[0].shape
    rows = batch * chunk_sizes(length, mesh.size())[mesh.get_local_rank()]
    return all_gather_object((errors, counter.get_total_flops(), 4 * 2 * rows * channels * channels))


def captured() -> dict:
    """Of models whose calls are captured: errors, and what became of the calls."""
    from test_untouched_capture import on_this_rank

    return on_this_rank()


def captured_and_changed_on_one_rank() -> None:
    """Rank 1 alone changes a model that is captured; ends with an error."""
    from test_untouched_capture import MANY, Model, nothing, set_factor

    from meshdiff import parallelize
    from meshdiff.distributed.consensus import store

    store().set_timeout(timedelta(seconds=3))
    model = Model(nothing)
    parallelize(model, init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], capture=True)
    with torch.no_grad():
        for step in MANY:
            step(model)
        if dist.get_rank() == 1:
            set_factor(model)
        for step in MANY:
            step(model)


def captured_traffic() -> list:
    """Of every rank: what a call sends on shards and as a program, and what comes of a compiled one."""
    from test_untouched_programs import traffic_and_compiled

    return traffic_and_compiled()


def captured_shapes() -> list:
    """Of every rank: what becomes of the programs of more shapes than are kept."""
    from test_untouched_kinds import of_many_shapes

    return all_gather_object(of_many_shapes())


def dtensor_rules() -> dict[str, list[str]]:
    """Of every rank: programs that DTensor has wrong, and how."""
    from test_dtensor_rules import on_this_rank

    return on_this_rank()


def untouched_gradients() -> float:
    """The largest relative error of a gradient of a model on shards, on any rank."""
    from untouched_cases import Model, inputs

    from meshdiff import parallelize
    from meshdiff.autoshard.numerics import difference

    one, other, given = Model("rows"), Model("rows"), inputs()
    one(**given).square().sum().backward()
    parallel = parallelize(other, init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"])
    parallel(**given).square().sum().backward()
    assert not parallel.whole
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(all_gather_object(max(difference(found.grad, expected.grad) for expected, found in pairs)))


def pipelines() -> dict:
    """Pipelines of diffusers on this world's layouts: the error, and the traffic of a call that is not the first."""
    from pipeline_cases import of_pipelines

    return of_pipelines(dist.get_world_size())


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed()
    outcome = globals()[sys.argv[1]]()
    if dist.get_rank() == 0:
        torch.save(outcome, sys.argv[2])
    dist.destroy_process_group()
    end_process(0)
