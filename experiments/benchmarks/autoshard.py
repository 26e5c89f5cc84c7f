"""`meshdiff.parallelize` against diffusers' own Ulysses, on transformers of diffusers, and against one rank.

    python -m experiments.benchmarks.autoshard
    python -m experiments.benchmarks.autoshard --models flux --text 512 --image 32 48
    python -m experiments.benchmarks.autoshard --device cuda --models wan --ranks 8 --compile \\
        --head-dim 128 --wan-ffn 8960 --wan-blocks 8 --text 512 --latents 21 60 104

Every side has the same weights, in the same memory, and the same inputs. All are timed in the same
processes, in turn, round after round, and what counts is the ratio in the same round: it holds on a
noisy machine. A rank is a process of this machine with one CPU thread; on a GPU there is the first rank alone, and
sends nothing: what is measured is what a rank computes, and how long Python takes to say so. Needs diffusers.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from experiments.benchmarks.layouts import LocalCopies
from experiments.benchmarks.wan import interleaved, ratios
from experiments.benchmarks.wan_contenders import Case, divide_theirs, inputs, randomize, reference
from meshdiff import CommsCounter, Layout, init_mesh
from meshdiff.autoshard import parallelize
from meshdiff.autoshard.capture import graph_capture as capture
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.launch import end_process, start_ranks
from meshdiff.integrations.diffusers import parallelize as parallelize_guided

OURS, THEIRS, ALONE = "meshdiff.parallelize", "diffusers' Ulysses", "one rank, the others idle"
CAPTURED = "meshdiff.parallelize, captured"
COMPILED, THEIRS_COMPILED = "meshdiff.parallelize, captured and compiled", "diffusers' Ulysses, compiled"
GUIDED = "guidance"
LIMIT = "diffusers' Ulysses, nothing sent"
BOUND = 1e-5
CALLS = 6
"""Before one is timed: by then calls have been captured, and compiled."""
WHAT_IS_TIMED = f"""\
Timed: a whole forward, from inputs to outputs that every rank has whole, of the slowest rank; the first calls,
  which find out what runs how, are not. "captured" ones run without the model's Python. "{ALONE}"
  is the untouched model. Of "{LIMIT}" each collective is a local copy of the same size,
  so its numbers are wrong: the limit of what communication costs.
Sent: by one rank in one forward, collectives of both together with what they move."""


@dataclass(frozen=True)
class Config:
    """Time meshdiff.parallelize and diffusers' Ulysses side by side, and compare what they return."""

    models: tuple[Literal["wan", "flux", "guidance"], ...] = ("wan", "flux", "guidance")
    """Models to measure, a table each: Wan attends to a text apart, FLUX to image and text together; guidance calls Wan
    twice, as a guided step does, on --cfg 2."""
    ranks: int = 2
    """Processes, with a CPU thread each; diffusers' Ulysses needs heads and tokens that they divide."""
    rounds: int = 9
    """Number of times that each is timed, in turn; one more warms up."""
    heads: int = 12
    """Attention heads."""
    head_dim: int = 64
    """Channels a head; the width of the transformers is heads * head_dim."""
    text: int = 128
    """Tokens of encoded text."""
    wan_blocks: int = 4
    """Blocks of Wan."""
    wan_ffn: int = 3072
    """Inner width of Wan's feed-forward layers; FLUX's is 4 times the width."""
    latents: tuple[int, int, int] = (8, 32, 32)
    """Latent frames, rows and columns of Wan; 1 x 2 x 2 of them are a token."""
    flux_blocks: tuple[int, int] = (2, 4)
    """Blocks of FLUX, with two streams and with one."""
    image: tuple[int, int] = (40, 48)
    """Rows and columns of FLUX's image tokens."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: what the first of --ranks does on a GPU, in bfloat16, the others left out."""
    compile: bool = False
    """Also compile: of meshdiff what was captured, of diffusers its blocks."""
    worker: tuple[str, str] | None = None
    """For the ranks that this script starts: what to measure, and where to write it."""

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def wan(self) -> Case:
        """The sizes from which `wan_contenders` builds Wan."""
        sizes = {"dim": self.dim, "heads": self.heads, "depth": self.wan_blocks, "ffn_dim": self.wan_ffn}
        return Case(device=self.device, latents=self.latents, dtype=self.dtype, text=self.text, **sizes)

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    def on_device(self, model: nn.Module, given: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """Model and inputs where they are measured; positions stay as they are, and times."""
        dtype, kept = getattr(torch, self.dtype), ("img_ids", "txt_ids", "timestep")
        moved = {name: tensor.to(self.device, None if name in kept else dtype) for name, tensor in given.items()}
        return model.to(self.device, dtype), moved

    @property
    def lengths(self) -> dict[str, int]:
        """The lengths that diffusers' Ulysses divides, by flag."""
        found = {"--heads": self.heads}
        if "wan" in self.models:
            found["tokens of --latents"] = self.wan.tokens
        if "flux" in self.models:  # its text is tokens, too
            found |= {"tokens of --image": self.image[0] * self.image[1], "--text": self.text}
        return found


def wan(config: Config) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer, and what it is called with."""
    latents, text = inputs(config.wan)
    given = {"hidden_states": latents, "timestep": torch.full((1,), 500.0), "encoder_hidden_states": text}
    return config.on_device(reference(config.wan), given)


def flux(config: Config) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer, and what it is called with."""
    from diffusers import FluxTransformer2DModel

    double, single = config.flux_blocks
    width = 7 * config.head_dim // 16  # of rows and columns in rotary positions, as in FLUX
    model = FluxTransformer2DModel(
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        axes_dims_rope=(config.head_dim - 2 * width, width, width),
    )
    generator = torch.Generator().manual_seed(1)
    rows, columns = config.image
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given = {
        "hidden_states": noise(1, rows * columns, model.config.in_channels),
        "encoder_hidden_states": noise(1, config.text, model.config.joint_attention_dim),
        "pooled_projections": noise(1, model.config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5),
        "img_ids": places,
        "txt_ids": torch.zeros(config.text, 3),
    }
    return config.on_device(randomize(model), given)


MODELS: dict[str, Callable[[Config], tuple[nn.Module, dict[str, Any]]]] = {"wan": wan, "flux": flux}


def with_same_weights(model: nn.Module) -> nn.Module:
    """Another module with the same tensors: what is put on a mesh is this module, and not its weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def without_sending(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with LocalCopies():
            return call()

    return run


def sides(config: Config, name: str, mesh: DeviceMesh) -> dict[str, Callable[[], Any]]:
    """The calls to time, by name; for the one on a single rank, the other ranks have nothing to do."""
    alone, given = MODELS[name](config)

    def call(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(**given, return_dict=False)[0]

    def of_ours(**options: Any) -> Callable[[], Tensor]:
        model = with_same_weights(alone)
        parallelize(model, mesh, **options)
        return call(model)

    def of_theirs() -> nn.Module:
        model = with_same_weights(alone)
        divide_theirs(model, config.wan, mesh.size())
        return model

    running = {OURS: of_ours(), CAPTURED: of_ours(capture=True), THEIRS: call(of_theirs())}
    if config.compile:
        compiled = of_theirs()
        compiled.compile_repeated_blocks()
        running |= {COMPILED: of_ours(capture=torch.compile), THEIRS_COMPILED: call(compiled)}
    return {**running, LIMIT: without_sending(running[THEIRS]), ALONE: call(alone)}


def guided_sides(config: Config, mesh: DeviceMesh) -> dict[str, Callable[[], Any]]:
    """A guided step: two calls with other texts, and the sum that guidance makes of them."""
    alone, given = wan(config)
    ours = with_same_weights(alone)
    parallelize_guided(ours, mesh)
    other = {**given, "encoder_hidden_states": given["encoder_hidden_states"].flip(1)}

    def step(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            conditioned, unconditioned = (model(**one, return_dict=False)[0] for one in (given, other))
            return unconditioned + 5.0 * (conditioned - unconditioned)

        return run

    return {OURS: step(ours), ALONE: step(alone)}


def sent(call: Callable[[], Any], mesh: DeviceMesh) -> tuple[str, int]:
    """Collectives of a call in words, and their bytes together."""
    with CommsCounter(mesh) as comms:
        call()
    counts: dict[str, int] = {}
    total = 0
    for collectives in comms.traffic.values():
        for collective, traffic in collectives.items():
            counts[collective] = counts.get(collective, 0) + traffic.count
            total += traffic.bytes
    return ", ".join(f"{count} {collective}" for collective, count in sorted(counts.items())), total


def measure(config: Config, name: str, mesh: DeviceMesh) -> dict[str, Any]:
    """Errors, seconds in each round, and what was sent; runs on every rank."""
    running = guided_sides(config, mesh) if name == GUIDED else sides(config, name, mesh["cp"])
    expected = running[ALONE]()
    errors, compared = {}, [side for side in running if side not in (LIMIT, ALONE)]
    for side in compared:
        found = max(float((running[side]() - expected).norm() / expected.norm()) for _ in range(CALLS))
        errors[side] = max(all_gather_object(found))
    comms = {side: sent(running[side], mesh) for side in compared}
    if dist.get_rank():
        running[ALONE] = lambda: None
    return {"errors": errors, "seconds": interleaved(running, config.rounds, "cpu"), "sent": comms}


def measure_share(config: Config, name: str, mesh: DeviceMesh) -> dict[str, Any]:
    """Seconds of the first rank of the mesh in each round, until all is computed and until all kernels are launched."""
    running = sides(config, name, mesh["cp"])
    del running[LIMIT]
    # What is captured is compared with the model, and here what nobody has sent may be anything.
    with patch.object(capture, "difference", lambda output, expected: 0.0):
        for run in running.values():
            for _ in range(CALLS):
                run()
    return {
        "seconds": interleaved(running, config.rounds, config.device),
        "host": {side: [seconds_until_asked(run) for _ in range(config.rounds)] for side, run in running.items()},
    }


def seconds_until_asked(run: Callable[[], Any]) -> float:
    """Seconds for which the CPU is busy with a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def table_of_share(config: Config, name: str, outcome: dict[str, Any]) -> Table:
    """Medians, and medians and ranges of ratios in the same round."""
    seconds, result = outcome["seconds"], Table(title=title(config, name))
    for column in ("forward", "ms", "against diffusers'", "CPU busy, ms"):
        result.add_column(column, justify="left" if column == "forward" else "right")
    for side, taken in seconds.items():
        against = THEIRS_COMPILED if side == COMPILED else THEIRS
        result.add_row(
            side,
            f"{statistics.median(taken) * 1e3:.1f}",
            "" if side == against else ratios(taken, seconds[against]),
            f"{statistics.median(outcome['host'][side]) * 1e3:.1f}",
        )
    return result


def title(config: Config, name: str) -> str:
    if name != "flux":
        shape = f"Wan: {config.wan_blocks} blocks, ffn {config.wan_ffn}, {config.wan.tokens} tokens, text {config.text}"
    else:
        double, single = config.flux_blocks
        tokens = config.image[0] * config.image[1]
        shape = f"FLUX: {double} + {single} blocks, {tokens} image tokens, text {config.text}"
    layout = "a guided step on --cfg 2" if name == GUIDED else f"{config.ranks} ranks"
    layout = layout if config.device == "cpu" else f"the first of {layout}, nothing sent"
    return f"{shape}, width {config.heads} x {config.head_dim}, {config.dtype}, {layout}"


def table(config: Config, name: str, outcome: dict[str, Any]) -> Table:
    """Medians, and medians and ranges of ratios in the same round."""
    seconds = outcome["seconds"]
    result = Table(title=title(config, name))
    for column in ("forward", "ms", "against diffusers'", "speed-up over one rank", "sent", "MB", "error"):
        result.add_column(column, justify="left" if column in ("forward", "sent") else "right")
    for side, taken in seconds.items():
        against = THEIRS_COMPILED if side == COMPILED else THEIRS
        collectives, nbytes = outcome["sent"].get(side, ("", 0))
        result.add_row(
            side,
            f"{statistics.median(taken) * 1e3:.1f}",
            "" if side == against or against not in seconds else ratios(taken, seconds[against]),
            "" if side == ALONE else ratios(seconds[ALONE], taken),
            collectives,
            f"{nbytes / 1e6:.2f}" if nbytes else "",
            f"{outcome['errors'][side]:.0e}" if side in outcome["errors"] else "",
        )
    return result


def processor(device: str) -> str:
    """The name of the machine's processor, or of its GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(config: Config) -> None:
    undivided = [f"{what} ({length})" for what, length in config.lengths.items() if length % config.ranks]
    if undivided or config.ranks < 2:
        problem = f"--ranks {config.ranks} is to be 2 or more" if config.ranks < 2 else f"does not divide {undivided}"
        raise SystemExit(f"{problem}, as diffusers' Ulysses needs")
    models = config.models if config.device == "cpu" else [name for name in config.models if name != GUIDED]
    console = Console(width=170)
    console.print(
        f"torch {version('torch')}, diffusers {version('diffusers')}, {processor(config.device)}, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {date.today()}.\n{WHAT_IS_TIMED}"
    )
    wrong = []
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            result = str(Path(folder) / "result.json")
            ranks = 1 if config.device == "cuda" else 2 if name == GUIDED else config.ranks
            code = start_ranks(ranks, ["-m", __spec__.name, *sys.argv[1:], "--worker", name, result])
            if code:
                raise SystemExit(code)
            outcome = json.loads(Path(result).read_text(encoding="utf-8"))
        if config.device == "cuda":
            console.print(table_of_share(config, name, outcome))
            continue
        console.print(table(config, name, outcome))
        wrong += [f"{name}, {side}: {e:.1e}" for side, e in outcome["errors"].items() if not e <= BOUND]
    if wrong:
        raise SystemExit(f"outputs differ from those of one device by more than {BOUND:.0e}: {'; '.join(wrong)}")
    if config.device == "cpu":
        console.print(f"All outputs are those of one device, to {BOUND:.0e} of their norm.")


if __name__ == "__main__":
    parsed = tyro.cli(Config)
    if parsed.worker is None:
        main(parsed)
    else:
        torch.set_num_threads(1)
        what, file = parsed.worker
        if parsed.device == "cuda":
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=parsed.ranks)
        with torch.no_grad():
            mesh = init_mesh(Layout(2) if what == GUIDED else Layout(1, parsed.ranks), parsed.device)
            measured = (measure if parsed.device == "cpu" else measure_share)(parsed, what, mesh)
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(measured), encoding="utf-8")
        dist.destroy_process_group()
        end_process(0)
