"""Mesh attention against others' attention over devices, and against what is possible.

    python -m experiments.benchmarks.attention

Everything is timed in the same processes, in turn, round after round, from this rank's
`[batch, own seq, heads, head_dim]` of query, key and value to its `[batch, own seq, heads * head_dim]`.
The limit is this rank's share of the same attention on contiguous tensors: nothing packed,
nothing sent. What matters is the ratio to it; it holds on a noisy machine, because all are
equally disturbed. Others are measured where they are installed:

    pip install diffusers transformers && pip install --no-deps para-attn yunchang
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from meshdiff import Layout, explain_strategy, init_mesh, mesh_attention
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.launch import end_process, start_ranks
from meshdiff.distributed.mesh import place

LIMIT = "limit: nothing sent"
Contender = Callable[[], Tensor]


@dataclass(frozen=True)
class Config:
    """Compare attention over devices: ours, others', and the limit."""

    seq: tuple[int, ...] = (1024, 4096)
    """Tokens of the whole sequence, one table for each."""
    heads: int = 12
    """Attention heads."""
    head_dim: int = 64
    """Channels a head."""
    batch: int = 1
    """Sequences."""
    ranks: int = 2
    """Processes, at one CPU thread or one GPU each."""
    rounds: int = 15
    """Number of times that each is timed, in turn."""
    dtype: str = "float32"
    """Dtype of query, key and value."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda."""
    worker: str | None = None
    """For the ranks that this script starts: where to write what they measured."""


def shards(config: Config, seq: int, mesh: DeviceMesh) -> tuple[list[Tensor], list[Tensor]]:
    """The full query, key and value, and this rank's part of them."""
    generator = torch.Generator().manual_seed(0)
    shape = config.batch, seq, config.heads, config.head_dim
    dtype = getattr(torch, config.dtype)
    whole = [torch.randn(shape, generator=generator).to(mesh.device_type, dtype) for _ in range(3)]
    return whole, [place(tensor, mesh, [Shard(1)]).to_local().contiguous() for tensor in whole]


def ours(config: Config, seq: int, mesh: DeviceMesh) -> dict[str, Contender]:
    """Each of our strategies, from DTensors, as a model on a mesh holds them."""
    whole, _ = shards(config, seq, mesh)
    inputs = [place(tensor, mesh, [Shard(1)]) for tensor in whole]
    choice = explain_strategy(*inputs)

    def attend(strategy: str) -> Contender:
        return lambda: mesh_attention(*inputs, strategy=strategy).to_local().flatten(2)

    named = {s: f"meshdiff {s}{' (auto)' if s == choice.strategy else ''}" for s in ("ulysses", "ring", "gather")}
    return {name: attend(strategy) for strategy, name in named.items()}


def limit(config: Config, seq: int, mesh: DeviceMesh) -> Contender:
    """The attention of this rank's heads alone, on tensors as the kernel likes them best."""
    whole, _ = shards(config, seq, mesh)
    own = [tensor.chunk(mesh.size(), dim=2)[mesh.get_local_rank()].transpose(1, 2).contiguous() for tensor in whole]
    return lambda: F.scaled_dot_product_attention(*own).transpose(1, 2).flatten(2)


def diffusers(config: Config, seq: int, mesh: DeviceMesh) -> dict[str, Contender]:
    """diffusers' Ulysses and ring; on a CPU its ring gets torch's own kernel, as it has none for a CPU."""
    from diffusers.models import attention_dispatch as theirs

    _, own = shards(config, seq, mesh)
    group = {"ring": mesh, "ulysses": mesh}

    def parallel(kind: str) -> SimpleNamespace:
        degrees = {f"{name}_degree": mesh.size() if name == kind else 1 for name in group}
        context = SimpleNamespace(
            **degrees,
            _ring_mesh=mesh,
            _ulysses_mesh=mesh,
            _ring_local_rank=mesh.get_local_rank(),
            convert_to_fp32=True,
            ulysses_anything=False,
            ring_anything=False,
        )
        return SimpleNamespace(context_parallel_config=context)

    def with_lse(ctx, query, key, value, *_, **__):  # what a ring needs of a kernel
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(tensor.transpose(1, 2) for tensor in (query, key, value))
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    def ring() -> Tensor:
        if mesh.device_type == "cuda":
            return theirs._native_flash_attention(*own, _parallel_config=parallel("ring")).flatten(2)
        out = theirs._templated_context_parallel_attention(
            *own, forward_op=with_lse, backward_op=None, _parallel_config=parallel("ring")
        )
        return out.flatten(2)

    def ulysses() -> Tensor:
        return theirs._native_attention(*own, _parallel_config=parallel("ulysses")).flatten(2)

    return {"diffusers ulysses": ulysses, "diffusers ring": ring}


def para_attention(config: Config, seq: int, mesh: DeviceMesh) -> dict[str, Contender]:
    """ParaAttention's Ulysses and ring."""
    from para_attn.para_attn_interface import ring_attn_func, ulysses_attn_func

    _, own = shards(config, seq, mesh)

    def attend(function) -> Contender:
        return lambda: function(*(t.transpose(1, 2) for t in own), mesh=mesh).transpose(1, 2).flatten(2)

    return {"ParaAttention ulysses": attend(ulysses_attn_func), "ParaAttention ring": attend(ring_attn_func)}


def yunchang(config: Config, seq: int, mesh: DeviceMesh) -> dict[str, Contender]:
    """yunchang's Ulysses with torch's flash kernel, which it has for CUDA only."""
    from yunchang import UlyssesAttention
    from yunchang.kernels import AttnType

    if mesh.device_type == "cpu":
        raise RuntimeError("has kernels for CUDA only")
    _, own = shards(config, seq, mesh)
    attention = UlyssesAttention(mesh.get_group(), attn_type=AttnType.TORCH_FLASH)
    return {"yunchang ulysses": lambda: attention(*own).flatten(2)}


def torch_experimental(config: Config, seq: int, mesh: DeviceMesh) -> dict[str, Contender]:
    """torch's own context parallelism, a ring, without its load balancing (which reorders tokens)."""
    from torch.distributed.tensor.experimental import _attention, context_parallel

    _attention._cp_options.enable_load_balance = False
    _, own = shards(config, seq, mesh)

    def attend() -> Tensor:
        # It insists on a buffer to divide; the shards are divided already.
        with context_parallel(mesh, buffers=[torch.empty(seq, device=mesh.device_type)], buffer_seq_dims=[0]):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in own)).transpose(1, 2).flatten(2)

    return {"torch context_parallel": attend}


PEERS = {
    "diffusers": diffusers,
    "para-attn": para_attention,
    "yunchang": yunchang,
    "torch": torch_experimental,
}


def contenders(config: Config, seq: int, mesh: DeviceMesh) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run here with right results, and for each of the others the reason why it does not."""
    whole, _ = shards(config, seq, mesh)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in whole)).transpose(1, 2).flatten(2)
    expected = place(expected, mesh, [Shard(1)]).to_local()
    candidates, refused = ours(config, seq, mesh), {}
    for package, build in PEERS.items():
        try:
            candidates |= build(config, seq, mesh)
        except Exception as error:  # whatever keeps others' code from running here is a result
            refused[package] = _first_line(error)
    for name, contender in list(candidates.items()):
        try:
            result = contender()
            right = result.shape == expected.shape and torch.allclose(result, expected, rtol=1e-2, atol=1e-2)
            outcome = "" if right else f"wrong: {list(result.shape)} where {list(expected.shape)} is right"
        except Exception as error:
            outcome = _first_line(error)
        problems = [problem for problem in all_gather_object(outcome) if problem]
        if problems:
            refused[name] = problems[0]
            del candidates[name]
    return candidates, refused


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"


def measure(config: Config, seq: int, mesh: DeviceMesh) -> dict:
    """Seconds of each contender in each round, those of the slowest rank."""
    running, refused = contenders(config, seq, mesh)
    running[LIMIT] = limit(config, seq, mesh)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for round_number in range(config.rounds + 1):
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            with torch.no_grad():
                running[name]()
            if mesh.device_type == "cuda":
                torch.cuda.synchronize()
            taken = max(all_gather_object(time.perf_counter() - start))
            if round_number:  # the first round warms up
                seconds[name].append(taken)
    return {"seconds": seconds, "refused": refused}


def table(config: Config, seq: int, outcome: dict) -> Table:
    """Medians, and the ratio to the limit of the same round."""
    shape = f"[{config.batch}, {seq}, {config.heads}, {config.head_dim}]"
    result = Table(title=f"{shape} {config.dtype}, {config.ranks} ranks on {config.device}")
    for column in ("attention", "ms", "against the limit", "lowest to highest"):
        result.add_column(column, justify="left" if column == "attention" else "right")
    free = outcome["seconds"][LIMIT]
    ordered = sorted(outcome["seconds"].items(), key=lambda item: statistics.median(item[1]))
    for name, seconds in ordered:
        ratios = [taken / least for taken, least in zip(seconds, free, strict=True)]
        spread = "" if name == LIMIT else f"{min(ratios):.3f} to {max(ratios):.3f}"
        result.add_row(name, f"{statistics.median(seconds) * 1e3:.1f}", f"{statistics.median(ratios):.3f}", spread)
    for name, reason in outcome["refused"].items():
        result.add_row(name, "-", "-", reason)
    return result


def versions() -> str:
    found = []
    for package in ("torch", *PEERS):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(dict.fromkeys(found))


def main(config: Config) -> None:
    console = Console()
    flags = [
        f"--{field.name.replace('_', '-')}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in ("seq", "worker")
    ]
    console.print(versions())
    with tempfile.TemporaryDirectory() as folder:
        result = str(Path(folder) / "result.json")
        lengths = ["--seq", *map(str, config.seq)]
        code = start_ranks(config.ranks, ["-m", __spec__.name, *flags, *lengths, "--worker", result])
        if code:
            raise SystemExit(code)
        for seq, outcome in json.loads(Path(result).read_text(encoding="utf-8")).items():
            console.print(table(config, int(seq), outcome))


if __name__ == "__main__":
    parsed = tyro.cli(Config)
    if parsed.worker is None:
        main(parsed)
    else:
        torch.set_num_threads(1)
        mesh = init_mesh(Layout(1, parsed.ranks), parsed.device)["cp"]
        outcomes = {seq: measure(parsed, seq, mesh) for seq in parsed.seq}
        if dist.get_rank() == 0:
            Path(parsed.worker).write_text(json.dumps(outcomes), encoding="utf-8")
        dist.destroy_process_group()
        end_process(0)
