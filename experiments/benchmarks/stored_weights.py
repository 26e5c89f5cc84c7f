"""The cost of dividing the weights of a transformer of diffusers between ranks, side by side with whole ones.

Two copies of one model are on the same mesh, one with its weights on every rank and one with a part of each weight on
each; they are called in turn, in the same processes. The blocks' weights are also gathered with nothing to compute
meanwhile, which says what could be hidden.

    torchrun --nproc-per-node 2 -m experiments.benchmarks.stored_weights
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import tyro
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.table import Table

from meshdiff import CommsCounter, Layout, init_mesh, parallelize
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.launch import end_process
from meshdiff.distributed.world import launched_world_size


@dataclass(frozen=True)
class Config:
    """Time a transformer with divided weights against the same one with whole weights."""

    heads: int = 8
    """Attention heads, of 64 channels each."""
    depth: int = 6
    """Blocks."""
    frames: int = 8
    """Latent frames."""
    size: int = 32
    """Latent rows and columns; a token covers 2 x 2."""
    rounds: int = 7
    """Calls of each, in turn."""
    offload: bool = False
    """Store the parts in host memory."""

    @property
    def tokens(self) -> int:
        return self.frames * (self.size // 2) ** 2


def seconds_of(call: Any) -> float:
    """Seconds of a call on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return max(all_gather_object(time.perf_counter() - start))


@torch.no_grad()
def main(config: Config) -> None:
    torch.set_num_threads(1)
    mesh = init_mesh(Layout(cp=launched_world_size()), "cpu")
    torch.manual_seed(0)
    whole = WanTransformer3DModel(
        num_attention_heads=config.heads, attention_head_dim=64, ffn_dim=256 * config.heads, num_layers=config.depth
    ).eval()
    parts = copy.deepcopy(whole)
    arguments = {
        "hidden_states": torch.randn(1, 16, config.frames, config.size, config.size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 64, 4096),
        "return_dict": False,
    }
    parallelize(whole, mesh["cp"])
    weights = parallelize(parts, mesh["cp"], shard_weights=True, offload=config.offload).weights
    assert weights is not None, "one rank has nothing to divide; start more"
    for _ in range(2):
        same = torch.equal(whole(**arguments)[0], parts(**arguments)[0])
    with CommsCounter(mesh) as comms:
        parts(**arguments)
    times: dict[str, list[float]] = {"whole": [], "divided": [], "gathers alone": []}
    for _ in range(config.rounds):
        times["whole"].append(seconds_of(lambda: whole(**arguments)))
        times["divided"].append(seconds_of(lambda: parts(**arguments)))
        times["gathers alone"].append(seconds_of(weights.fetch_all))
    ratios = [divided / full for divided, full in zip(times["divided"], times["whole"], strict=True)]
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {config.tokens:,} tokens, {config.depth} blocks; the same bits: {same}")
        print(weights)
        table = Table("", "seconds of a call, median", "range")
        for name, seconds in times.items():
            table.add_row(name, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f} to {max(seconds):.3f}")
        ratio, least, most = statistics.median(ratios), min(ratios), max(ratios)
        table.add_row("divided / whole", f"{ratio:.3f}", f"{least:.3f} to {most:.3f}")
        Console().print(table)
        print("sent by a rank in a call:", comms.as_dict())
    end_process(0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
