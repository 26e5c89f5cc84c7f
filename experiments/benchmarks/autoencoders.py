"""Decoding with the rows of the images shared by the ranks of a mesh, side by side with one rank alone.

Both are the same model in the same processes, called in turn: on the mesh by all ranks, and untouched by rank 0 while
the others wait.

    torchrun --nproc-per-node 2 -m experiments.benchmarks.autoencoders
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from diffusers import AutoencoderKL, AutoencoderKLWan
from rich.console import Console
from rich.table import Table
from torch import Tensor

from meshdiff import CommsCounter, Layout, init_mesh, parallelize
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.launch import end_process
from meshdiff.distributed.world import launched_world_size


@dataclass(frozen=True)
class Config:
    """Time a decoder on a mesh against the same one on one rank."""

    model: Literal["kl", "wan"] = "kl"
    """The autoencoder of Stable Diffusion, 8 x 8 pixels a latent, or that of Wan 2.1, 4 frames of 8 x 8, each with the
    channels of the released one and random weights."""
    height: int = 256
    """Pixels."""
    width: int = 256
    """Pixels."""
    frames: int = 5
    """Of Wan."""
    rounds: int = 5
    """Calls of each, in turn."""


def build(config: Config) -> tuple[Any, Tensor]:
    """The model, and latents for it."""
    torch.manual_seed(0)
    size = config.height // 8, config.width // 8
    if config.model == "kl":
        model = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        return model.eval(), torch.randn(1, 4, *size)
    return AutoencoderKLWan().eval(), torch.randn(1, 16, 1 + (config.frames - 1) // 4, *size)


def seconds_of(call: Callable[[], Any], alone: bool = False) -> float:
    """Seconds of a call on the slowest rank, or of rank 0 alone."""
    dist.barrier()
    start = time.perf_counter()
    if not alone or dist.get_rank() == 0:
        call()
    return max(all_gather_object(time.perf_counter() - start if not alone or dist.get_rank() == 0 else 0.0))


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(Layout(cp=launched_world_size()), "cpu")["cp"]
    model, latents = build(config)
    expected = model.decode(latents).sample
    times: dict[str, list[float]] = {"one rank": [], "on the mesh": []}
    error = 0.0
    for _ in range(config.rounds):
        times["one rank"].append(seconds_of(lambda: model.decode(latents), alone=True))
        parallel = parallelize(model.decoder, mesh, dim=-2)
        for _ in range(2):  # finds out what runs how
            error = difference(model.decode(latents).sample, expected)
        with CommsCounter(mesh) as comms:
            times["on the mesh"].append(seconds_of(lambda: model.decode(latents)))
        report = parallel.report()
        parallel.remove()
    ratios = [shared / alone for shared, alone in zip(times["on the mesh"], times["one rank"], strict=True)]
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {config.height} x {config.width}; relative error {error:.1e}")
        print(str(report).splitlines()[0])
        table = Table("", "seconds of a call, median", "range")
        for name, seconds in times.items():
            table.add_row(name, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f} to {max(seconds):.3f}")
        ratio, least, most = statistics.median(ratios), min(ratios), max(ratios)
        table.add_row("on the mesh / one rank", f"{ratio:.3f}", f"{least:.3f} to {most:.3f}")
        Console().print(table)
        print("sent by a rank in a call:", comms.as_dict())
    end_process(0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
