"""Wan's transformer here against diffusers' with the same weights, on one rank and on several.

    python -m experiments.benchmarks.wan                # CPU: one rank, cp=2, cfg=2, memory
    python -m experiments.benchmarks.wan --device cuda  # Wan2.1-1.3B, eager and compiled, and what one of N ranks does

Where both sides run at once they are timed in the same processes, in turn, round after round, and
what counts is the ratio in the same round: it holds on a noisy machine. On a CPU a rank has one
thread; what one rank takes is measured while nothing else runs. Needs diffusers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore

from experiments.benchmarks.wan_contenders import (
    WAN,
    Case,
    Ours,
    added_bytes,
    compile_blocks,
    divide_theirs,
    random_weights,
    reference,
    their_call,
    weights_of,
)
from meshdiff import Layout, explain_strategy, init_mesh
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.launch import end_process, start_ranks
from meshdiff.distributed.mesh import place
from meshdiff.distributed.placements import SEQUENCE
from meshdiff.models.wan import unpatchify

OURS, OURS_WITH_TEXT, THEIRS = "meshdiff", "meshdiff, text projected each time", "diffusers"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
LEFT_OUT: dict[str, dict[str, Any]] = {
    "cpu": {"dim": 768, "heads": 12, "depth": 4, "ffn_dim": 4480, "latents": (8, 32, 32), "dtype": "float32"},
    "cuda": {name: getattr(WAN, name) for name in ("dim", "heads", "depth", "ffn_dim")}
    | {"latents": (21, 60, 104), "dtype": "bfloat16"},
}
WHAT_IS_TIMED = """\
Timed of diffusers: its transformer, as its pipeline calls it for each step and branch: positions, patches, the text
  projected to each block's keys and values, the blocks, the head, and back to latents; on 2 ranks the velocity is
  gathered on both.
Timed of meshdiff: its transformer on DTensors, as a run calls it in each step: tokens in, the blocks, the head, tokens
  out, which stay divided. Positions, tokens and the text's keys and values are made once a run, outside the time;
  where a row says so, the text is projected inside it, as diffusers does."""


@dataclass(frozen=True)
class Config(Case):
    """Wan's transformer here against diffusers'; sizes left out are small on a CPU, and Wan2.1-1.3B's on a GPU."""

    section: Literal["cpu", "gpu"] | None = None
    """The part to run, by default that of the device; the GPU part of a small model runs on a CPU as well."""
    rounds: int = 9
    """Number of times that each is timed, in turn."""
    runs: int = 3
    """Number of times that one rank and cfg=2 are measured in new processes, in turn."""
    worker: tuple[str, int, int, str] | None = None
    """For the ranks that this script starts: task, cfg, cp, and where to write what was measured."""


def checked_error(ours: Ours, theirs: Callable[[], Tensor], config: Config) -> float:
    """The largest difference of the outputs, relative to the largest value; one above the limit ends the benchmark."""
    expected = theirs().float()
    found = unpatchify(ours.velocity().full_tensor(), config.grid, WAN.patch)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[config.dtype]:
        raise SystemExit(f"outputs differ by {error:.1e}; at most {TOLERANCE[config.dtype]:.0e} is right")
    return error


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each in each round, those of the slowest rank; a first round warms up.

    What ran before leaves its traces, a rank that had nothing to do above all: so the order is another in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name in random.Random(round_number).sample(list(contenders), len(contenders)):
            all_gather_object(None)
            start = time.perf_counter()
            contenders[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            taken = max(all_gather_object(time.perf_counter() - start))
            if round_number:
                seconds[name].append(taken)
    return seconds


def median_seconds(run: Callable[[], Any], config: Config) -> float:
    return statistics.median(interleaved({"": run}, config.rounds, config.device)[""])


def compare(config: Config, mesh: DeviceMesh) -> dict[str, Any]:
    """Both transformers over the cp ranks of the mesh: how far apart they are, seconds, and bytes of each rank."""
    theirs = reference(config)
    ours, call = Ours(config, weights_of(theirs, config), mesh), their_call(theirs, config)
    if mesh.size() > 1:
        divide_theirs(theirs, config, mesh.size())
    error = checked_error(ours, call, config)
    contenders = {OURS: ours.velocity, OURS_WITH_TEXT: ours.velocity_with_text, THEIRS: call}
    seconds = interleaved(contenders, config.rounds, config.device)
    of_theirs = sum(parameter.nbytes for parameter in theirs.parameters())
    return {"error": error, "seconds": seconds, OURS: memory_of(ours), THEIRS: (of_theirs, 0, added_bytes(call, "cpu"))}


def memory_of(ours: Ours) -> tuple[int, int, int]:
    """Bytes of stored weights, of the text's keys and values, and those that a forward adds."""
    return ours.stored, ours.context.to_local().nbytes, added_bytes(ours.velocity, "cpu")


def sharded_memory(config: Config, mesh: DeviceMesh) -> tuple[int, int, int]:
    return memory_of(Ours(config, random_weights(config), mesh, divided=True))


def guided(config: Config, mesh: DeviceMesh, branches: int = 2) -> float:
    """Seconds of a step's branches, of the slowest rank."""
    step = Ours(config, random_weights(config), mesh, branches).guided()
    return median_seconds(step, dataclasses.replace(config, rounds=3))


def one_branch(config: Config, mesh: DeviceMesh) -> float:
    return guided(config, mesh, branches=1)


def share(config: Config, mesh: DeviceMesh) -> tuple[str, tuple[float, float], int]:
    """The strategy, seconds eager and compiled, and bytes of the first rank of a mesh, which has the most to do."""
    ours = Ours(config, random_weights(config), mesh)
    query = torch.empty(1, config.tokens, config.heads, config.shape.head_dim, dtype=config.torch_dtype)
    query = place(query.to(config.device), mesh["cp"], [SEQUENCE])
    peak, eager = ours.stored + added_bytes(ours.velocity, config.device), median_seconds(ours.velocity, config)
    compile_blocks(ours)
    return explain_strategy(query, query, query).strategy, (eager, median_seconds(ours.velocity, config)), peak


TASKS = {task.__name__: task for task in (compare, sharded_memory, guided, one_branch, share)}


def in_new_ranks(task: Callable[..., Any], layout: Layout, started: int | None = None) -> Any:
    """The result of a task in processes started for it, with the flags of this one; some or all ranks of a layout."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        worker = ["--worker", task.__name__, str(layout.cfg), str(layout.cp), str(result)]
        code = start_ranks(started or layout.world_size, ["-m", __spec__.name, *sys.argv[1:], *worker])
        if code:
            raise SystemExit(code)
        return json.loads(result.read_text(encoding="utf-8"))


def independent() -> float:
    """Seconds of one branch in each of two processes that run at once and know nothing of each other."""
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{i}.json" for i in range(2)]
        command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--worker", one_branch.__name__, "1", "1"]
        started = [subprocess.Popen([*command, str(result)]) for result in results]
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit(1)
        return max(json.loads(result.read_text(encoding="utf-8")) for result in results)


def flops(config: Config) -> tuple[int, int]:
    """Operations of one forward, and of projecting the text; a multiplication and an addition count as two."""
    s, seq, text = config.shape, config.tokens, config.text
    block = 2 * seq * (6 * s.dim * s.dim + 2 * s.dim * s.ffn_dim) + 4 * seq * (seq + text) * s.dim
    ends = 4 * seq * s.patch_dim * s.dim + 2 * s.dim * (s.frequency_dim + 7 * s.dim)
    return s.depth * block + ends, 2 * text * (s.text_dim * s.dim + s.dim * s.dim * (1 + 2 * s.depth))


def ratios(seconds: list[float], others: list[float]) -> str:
    """Median and range of the ratio in the same round."""
    values = [own / other for own, other in zip(seconds, others, strict=True)]
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def show(console: Console, title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A table that docs/ can take as it is."""
    table = Table(*head, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(f"\n{title}\n", table, sep="\n")


def show_comparison(console: Console, title: str, outcome: dict[str, Any], wanted: float) -> None:
    seconds = outcome["seconds"]
    rows = [
        (name, f"{statistics.median(taken):.3f}")
        + (("", "") if name == THEIRS else (ratios(taken, seconds[THEIRS]), f"at most {wanted:.2f}"))
        for name, taken in seconds.items()
    ]
    title = f"{title} (outputs differ by {outcome['error']:.1e} of the largest value)"
    show(console, title, ("transformer", "s / forward", "against diffusers", "wanted"), rows)


def show_branches(console: Console, runs: int) -> None:
    """One rank with both branches, two ranks with one each, and two processes that do not talk, in turn."""
    alone, together, apart = [], [], []
    for _ in range(runs):
        alone.append(in_new_ranks(guided, Layout(1, 1)))
        together.append(in_new_ranks(guided, Layout(2, 1)))
        apart.append(independent())
    rows = [
        ("one rank, a batch of 2", f"{statistics.median(alone):.3f}", "", ""),
        ("cfg=2", f"{statistics.median(together):.3f}", ratios(alone, together), "at least 1.900"),
        ("two processes that do not talk", f"{statistics.median(apart):.3f}", ratios(alone, apart), "the limit"),
    ]
    title = "A step of two branches: both velocities, gathered, and guidance"
    show(console, title, ("layout", "s / step", "speed-up", "wanted"), rows)


def show_memory(console: Console, one: dict[str, Any], two: dict[str, Any], sharded: tuple[int, int, int]) -> None:
    named = {f"{name}, cp={cp}": outcome[name] for name in (OURS, THEIRS) for cp, outcome in ((1, one), (2, two))}
    named[f"{OURS}, cp=2, --shard-weights"] = sharded
    rows = [(name, *(f"{part / 1e6:.1f}" for part in (*parts, sum(parts)))) for name, parts in named.items()]
    title = "Peak memory: live tensors, counted exactly; scratch of kernels and gloo's buffers are not in it"
    show(console, title, ("MB per rank", "weights", "text keys, values", "a forward adds", "together"), rows)
    weights, text, added = (after / before for before, after in zip(one[OURS], two[OURS], strict=True))
    console.print(
        f"Activations: {added:.2f} of one rank's at cp=2; they have a row for each token, and tokens are divided.\n"
        f"Weights: {weights:.2f}; every rank computes with all. With --shard-weights: {sharded[0] / one[OURS][0]:.2f}, "
        f"but a forward adds {(sharded[2] - two[OURS][2]) / 1e6:.1f} MB: a block's, whole, and the next one's.\n"
        f"Text keys and values: {text:.2f}; the tokens of every rank look at the whole text, in every block."
    )


def on_cpu(config: Config, console: Console) -> None:
    forward, of_text = flops(config)
    console.print(
        f"One thread a rank; the text is {of_text / (forward + of_text):.1%} of the FLOPs of diffusers' side."
    )
    one, two = (in_new_ranks(compare, Layout(1, cp)) for cp in (1, 2))
    show_comparison(console, "One rank", one, 1.0)
    show_comparison(console, "cp=2, against diffusers' Ulysses on the same ranks", two, 0.95)
    show_branches(console, config.runs)
    show_memory(console, one, two, in_new_ranks(sharded_memory, Layout(1, 2)))


def matmul_rate(config: Config) -> float:
    """FLOP/s of the matrix products that most of a forward is made of, one after the other."""
    dim, ffn, repeats = config.dim, config.ffn_dim, 10
    sizes = ((dim, 3 * dim), (dim, dim), (dim, dim), (dim, dim), (dim, ffn), (ffn, dim))
    new = {"device": config.device, "dtype": config.torch_dtype}
    operands = [(torch.randn(config.tokens, rows, **new), torch.randn(columns, rows, **new)) for rows, columns in sizes]
    taken = median_seconds(lambda: [F.linear(*pair) for _ in range(repeats) for pair in operands], config)
    return repeats * sum(2 * config.tokens * rows * columns for rows, columns in sizes) / taken


def kernel_rates(config: Config) -> str:
    """TFLOP/s of each kernel that torch has for self-attention of this shape."""
    shape = 1, config.heads, config.tokens, config.shape.head_dim
    x = torch.randn(shape, device=config.device, dtype=config.torch_dtype)
    rates = []
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                taken = median_seconds(lambda: F.scaled_dot_product_attention(x, x, x), config)
            rates.append(f"{name} {4 * config.tokens**2 * config.dim / taken / 1e12:.3g}")
        except RuntimeError:
            rates.append(f"{name} not available")
    return ", ".join(rates)


def kernels_of(run: Callable[[], Any]) -> str:
    """The attention kernels that a call took."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    prefix = "aten::_scaled_dot_product_"
    found = {event.key.removeprefix(prefix) for event in profile.key_averages() if event.key.startswith(prefix)}
    return ", ".join(sorted(found)) or "none of torch's"


def show_one_gpu(console: Console, config: Config, theirs: nn.Module, ours: Ours, limit: float) -> None:
    """Forwards of both, eager and compiled."""
    call, rows = their_call(theirs, config), []
    console.print(f"Outputs differ by {checked_error(ours, call, config):.1e} of the largest value.")
    stored = {OURS: ours.stored, THEIRS: sum(parameter.nbytes for parameter in theirs.parameters())}
    contenders = {OURS: ours.velocity, THEIRS: call}
    for way in ("eager", "compiled"):
        if way == "compiled":
            compile_blocks(ours)
            theirs.compile_repeated_blocks(fullgraph=True, dynamic=False)
        seconds = interleaved(contenders, config.rounds, config.device)
        for name, taken in seconds.items():
            median, peak = statistics.median(taken), stored[name] + added_bytes(contenders[name], config.device)
            numbers = (
                f"{median * 1e3:.1f}",
                ratios(taken, seconds[THEIRS]),
                f"{limit / median:.0%}",
                f"{peak / 1e9:.2f}",
            )
            rows.append((f"{name}, {way}", *numbers, kernels_of(contenders[name])))
    head = ("transformer", "ms / forward", "against diffusers", "of the limit", "peak GB", "attention kernel")
    show(console, "One forward", head, rows)


def show_shares(console: Console) -> None:
    """Show the time of one rank of several, against its share of the time of one rank alone."""
    rows, first = [], None
    for cp in (1, 2, 4, 8):
        strategy, times, peak = in_new_ranks(share, Layout(1, cp), started=1)
        first = first or times
        of_ways = [(f"{t * 1e3:.1f}", f"{one / t / cp:.0%}") for one, t in zip(first, times, strict=True)]
        rows.append((cp, strategy, *of_ways[0], *of_ways[1], f"{peak / 1e9:.2f}"))
    head = ("cp", "strategy", "eager ms", "efficiency", "compiled ms", "efficiency", "peak GB, eager")
    show(console, "One rank of cp, communication free; at 100% it takes 1/cp of the time of one rank", head, rows)


def on_gpu(config: Config, console: Console) -> None:
    rate, forward = matmul_rate(config), flops(config)[0]
    console.print(
        f"{torch.cuda.get_device_name() if config.device == 'cuda' else platform.machine()}, cuDNN "
        f"{torch.backends.cudnn.version()}: matrix products {rate / 1e12:.3g} TFLOP/s, attention kernels "
        f"{kernel_rates(config)} TFLOP/s. A forward is {forward / 1e12:.4g} TFLOP, at the rate of matrix products "
        f"{forward / rate * 1e3:.1f} ms: the limit."
    )
    theirs = reference(config)
    ours = Ours(config, weights_of(theirs, config), init_mesh(Layout(), config.device))
    show_one_gpu(console, config, theirs, ours, forward / rate)
    show_shares(console)


def main(config: Config) -> None:
    left_out = {name: size for name, size in LEFT_OUT[config.device].items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **left_out)
    if config.device == "cpu":
        torch.set_num_threads(1)
    if config.worker is not None:
        task, cfg, cp, result = config.worker
        if task == share.__name__:  # the only rank there is: to the others, collectives send nothing, and return
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=cp)
        outcome = TASKS[task](config, init_mesh(Layout(cfg, cp), config.device))
        if dist.get_rank() == 0:
            Path(result).write_text(json.dumps(outcome), encoding="utf-8")
        dist.destroy_process_group()
        end_process(0)
    console = Console(width=160)
    console.print(
        f"{config.depth} blocks of dim {config.dim}, {config.heads} heads, ffn {config.ffn_dim}, {config.tokens} "
        f"tokens, text {config.text} x {config.text_dim}, {config.dtype}, random weights; torch {version('torch')}, "
        f"diffusers {version('diffusers')}, {len(os.sched_getaffinity(0))} cores; {date.today()}.\n{WHAT_IS_TIMED}"
    )
    if (config.section or config.device) == "cpu":
        on_cpu(config, console)
    else:
        on_gpu(config, console)


if __name__ == "__main__":
    with torch.no_grad():
        main(tyro.cli(Config))
