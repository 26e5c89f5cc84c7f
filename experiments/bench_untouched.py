"""`meshdiff.parallelize` against diffusers' own Ulysses, on transformers of diffusers, and against one rank.

    python experiments/bench_untouched.py
    python experiments/bench_untouched.py --models flux --text 512 --image 32 48

Every side has the same weights, in the same memory, and the same inputs. All are timed in the same
processes, in turn, round after round, and what counts is the ratio in the same round: it holds on a
noisy machine. A rank is a process of this machine with one CPU thread. Needs diffusers.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from bench_layouts import LocalCopies
from bench_wan import interleaved, ratios
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from wan_sides import Case, divide_theirs, inputs, randomize, reference

from meshdiff import CommsCounter, Layout, init_mesh
from meshdiff.agreement import from_every_rank
from meshdiff.integrations.diffusers import parallelize as parallelize_guided
from meshdiff.launch import end_process, start_ranks
from meshdiff.untouched import parallelize

OURS, THEIRS, ALONE = "meshdiff.parallelize", "diffusers' Ulysses", "one rank, the others idle"
GUIDED = "guidance"
LIMIT = "diffusers' Ulysses, nothing sent"
BOUND = 1e-5
WHAT_IS_TIMED = f"""\
Timed: a whole forward, from inputs to outputs that every rank has whole, of the slowest rank; the first calls,
  which find out what runs how, are not. "{ALONE}" is the untouched model. Of "{LIMIT}" each
  collective is a local copy of the same size, so its numbers are wrong: the limit of what communication costs.
Sent: by one rank in one forward, collectives of both together with what they move."""


@dataclass(frozen=True)
class Config:
    """Time meshdiff.parallelize and diffusers' Ulysses side by side, and compare what they return."""

    models: tuple[Literal["wan", "flux", "guidance"], ...] = ("wan", "flux", "guidance")
    """Which to measure, a table each: Wan attends to a text apart, FLUX to image and text together; guidance calls Wan
    twice, as a guided step does, on --cfg 2."""
    ranks: int = 2
    """Processes, with a CPU thread each; diffusers' Ulysses needs heads and tokens that they divide."""
    rounds: int = 9
    """How often each is timed, in turn; one more warms up."""
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
    worker: tuple[str, str] | None = None
    """For the ranks that this script starts: what to measure, and where to write it."""

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def wan(self) -> Case:
        """What wan_sides.py builds Wan from."""
        sizes = {"dim": self.dim, "heads": self.heads, "depth": self.wan_blocks, "ffn_dim": self.wan_ffn}
        return Case(device="cpu", latents=self.latents, dtype="float32", text=self.text, **sizes)

    @property
    def lengths(self) -> dict[str, int]:
        """What diffusers' Ulysses divides, by flag."""
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
    return reference(config.wan), given


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
    return randomize(model), given


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
    """What is timed; the rank that is alone has others that have nothing to do."""
    alone, given = MODELS[name](config)
    ours, theirs = with_same_weights(alone), with_same_weights(alone)
    parallelize(ours, mesh)
    divide_theirs(theirs, config.wan, mesh.size())

    def call(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(**given, return_dict=False)[0]

    of_theirs = call(theirs)
    return {OURS: call(ours), THEIRS: of_theirs, LIMIT: without_sending(of_theirs), ALONE: call(alone)}


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
    errors, compared = {}, [side for side in running if side in (OURS, THEIRS)]
    for side in compared:
        # The second call of parallelize is the first that goes as all others do.
        found = max(float((running[side]() - expected).norm() / expected.norm()) for _ in range(2))
        errors[side] = max(from_every_rank(found))
    comms = {side: sent(running[side], mesh) for side in compared}
    if dist.get_rank():
        running[ALONE] = lambda: None
    return {"errors": errors, "seconds": interleaved(running, config.rounds, "cpu"), "sent": comms}


def title(config: Config, name: str) -> str:
    if name != "flux":
        shape = f"Wan: {config.wan_blocks} blocks, ffn {config.wan_ffn}, {config.wan.tokens} tokens, text {config.text}"
    else:
        double, single = config.flux_blocks
        tokens = config.image[0] * config.image[1]
        shape = f"FLUX: {double} + {single} blocks, {tokens} image tokens, text {config.text}"
    layout = "a guided step on --cfg 2" if name == GUIDED else f"{config.ranks} ranks"
    return f"{shape}, width {config.heads} x {config.head_dim}, float32, {layout}"


def table(config: Config, name: str, outcome: dict[str, Any]) -> Table:
    """Medians, and medians and ranges of ratios in the same round."""
    seconds = outcome["seconds"]
    result = Table(title=title(config, name))
    for column in ("forward", "ms", "against diffusers'", "speed-up over one rank", "sent", "MB", "error"):
        result.add_column(column, justify="left" if column in ("forward", "sent") else "right")
    for side, taken in seconds.items():
        collectives, nbytes = outcome["sent"].get(side, ("", 0))
        result.add_row(
            side,
            f"{statistics.median(taken) * 1e3:.1f}",
            "" if side == THEIRS or THEIRS not in seconds else ratios(taken, seconds[THEIRS]),
            "" if side == ALONE else ratios(seconds[ALONE], taken),
            collectives,
            f"{nbytes / 1e6:.2f}" if nbytes else "",
            f"{outcome['errors'][side]:.0e}" if side in outcome["errors"] else "",
        )
    return result


def processor() -> str:
    """What the machine calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(config: Config) -> None:
    undivided = [f"{what} ({length})" for what, length in config.lengths.items() if length % config.ranks]
    if undivided or config.ranks < 2:
        problem = f"--ranks {config.ranks} is to be 2 or more" if config.ranks < 2 else f"does not divide {undivided}"
        raise SystemExit(f"{problem}, as diffusers' Ulysses needs")
    console = Console(width=170)
    console.print(
        f"torch {version('torch')}, diffusers {version('diffusers')}, {processor()}, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; {date.today()}.\n{WHAT_IS_TIMED}"
    )
    wrong = []
    for name in config.models:
        with tempfile.TemporaryDirectory() as folder:
            result = str(Path(folder) / "result.json")
            ranks = 2 if name == GUIDED else config.ranks
            code = start_ranks(ranks, os.path.abspath(__file__), [*sys.argv[1:], "--worker", name, result])
            if code:
                raise SystemExit(code)
            outcome = json.loads(Path(result).read_text())
        console.print(table(config, name, outcome))
        wrong += [f"{name}, {side}: {e:.1e}" for side, e in outcome["errors"].items() if not e <= BOUND]
    if wrong:
        raise SystemExit(f"outputs differ from those of one device by more than {BOUND:.0e}: {'; '.join(wrong)}")
    console.print(f"All outputs are those of one device, to {BOUND:.0e} of their norm.")


if __name__ == "__main__":
    parsed = tyro.cli(Config)
    if parsed.worker is None:
        main(parsed)
    else:
        torch.set_num_threads(1)
        what, file = parsed.worker
        with torch.no_grad():
            measured = measure(parsed, what, init_mesh(Layout(2) if what == GUIDED else Layout(1, parsed.ranks), "cpu"))
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(measured))
        dist.destroy_process_group()
        end_process(0)
