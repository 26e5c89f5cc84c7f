"""Memory of ranks that run a pipeline of diffusers with divided weights, for several numbers of ranks.

A folder with random weights is written first, of Wan's kind: a transformer, a text encoder as large, and Wan's own
autoencoder. Then each number of ranks loads it and makes a clip of one step.

    python -m experiments.benchmarks.memory --ranks 1 2 4 8
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import logging
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from experiments.tiny_models.wan_checkpoint import Config as WanConfig
from experiments.tiny_models.wan_checkpoint import make_pipeline
from meshdiff import Layout, init_mesh
from meshdiff.autoshard.numerics import difference
from meshdiff.diffusion.request import Request
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.launch import end_process, start_ranks
from meshdiff.distributed.world import launched_world_size
from meshdiff.integrations.diffusers_model import DiffusersModel, DiffusersRun

MB = 1e6


@dataclass(frozen=True)
class Config:
    """Load a large pipeline with divided weights on several numbers of ranks, and say what each rank holds."""

    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Numbers of ranks, as processes of this machine."""
    width: int = 1024
    """Channels of transformer and text encoder."""
    depth: int = 30
    """Blocks of the transformer; the text encoder has as many weights."""
    folder: Path | None = None
    """Of the pipeline, which is written if it is not there; a temporary one by default."""
    to: Path | None = None
    """A folder for what the ranks hand over."""


def write_pipeline(folder: Path, config: Config) -> None:
    """Write a pipeline of Wan's kind with random float32 weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as tokenizer:
        tiny = make_pipeline(WanConfig(out=Path()), Path(tokenizer))
        width = config.width
        encoder = UMT5Config(
            vocab_size=tiny.text_encoder.config.vocab_size,
            d_model=width,
            d_kv=64,
            d_ff=11 * width // 4,
            num_heads=width // 64,
            num_layers=4 * config.depth // 3,
            is_gated_act=True,
        )
        parts: dict[str, nn.Module] = {
            "text_encoder": UMT5EncoderModel(encoder),
            "transformer": WanTransformer3DModel(
                num_attention_heads=width // 64,
                attention_head_dim=64,
                ffn_dim=4 * width,
                text_dim=width,
                num_layers=config.depth,
            ),
            "vae": AutoencoderKLWan(),
        }
        tiny.register_modules(**parts)
        tiny.save_pretrained(folder, max_shard_size="1GB")


def anonymous() -> int:
    """Bytes of memory of this process that are not those of a file."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The largest growth of anonymous memory in the body, as the only item of a list when it has ended."""
    found, start, ended = [0], anonymous(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            found[0] = max(found[0], anonymous() - start)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def on_ranks(config: Config) -> None:
    """Load the pipeline and make a clip; rank 0 writes what came of it."""
    assert config.to is not None
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    mesh = init_mesh(Layout(1, launched_world_size()), "cpu")
    model = DiffusersModel(str(config.folder))
    with peak() as loading:
        run = DiffusersRun(model, mesh, torch.float32, shard_weights=launched_world_size() > 1)
    weights = run.parallel.weights.values()
    parts = [part for part in run.pipeline.components.values() if isinstance(part, nn.Module)]
    request = Request("a cat", steps=1, height=128, width=128, frames=5, guidance_scale=1.0)
    start = time.perf_counter()
    with torch.no_grad():
        clip = run.generate(model.prepare(request))
    found = {
        "total": sum(stored.nbytes for stored in weights) + _left(run, parts),
        "held": sum(stored.stored_bytes + stored.resident_bytes for stored in weights) + _left(run, parts),
        "blocks": 2 * max((stored.largest for stored in weights), default=0),
        "loading": loading[0],
        "seconds": time.perf_counter() - start,
    }
    of_all = all_gather_object(found)
    if dist.get_rank() == 0 if dist.is_initialized() else True:
        torch.save(clip, config.to / f"{launched_world_size()}.pt")
        (config.to / f"{launched_world_size()}.json").write_text(json.dumps(of_all), encoding="utf-8")


def _left(run: DiffusersRun, parts: list[nn.Module]) -> int:
    """Bytes of parameters of parts that are not divided."""
    stored = [weights.module for weights in run.parallel.weights.values()]
    others = [part for part in parts if not any(part is module for module in stored)]
    return sum(parameter.nbytes for part in others for parameter in part.parameters())


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if config.to is not None:
        on_ranks(config)
        end_process(0)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder, to = config.folder or Path(temporary) / "pipeline", Path(temporary) / "found"
        to.mkdir()
        if not folder.exists():
            write_pipeline(folder, config)
        table = Table(
            "ranks", "all weights", "weights of a rank", "and two blocks", "grown to load", "seconds", "error"
        )
        clips: dict[int, Tensor] = {}
        for ranks in config.ranks:
            start_ranks(ranks, ["-m", __spec__.name, "--folder", str(folder), "--to", str(to)])
            of_all = json.loads((to / f"{ranks}.json").read_text(encoding="utf-8"))
            clips[ranks] = torch.load(to / f"{ranks}.pt")
            most = {name: max(of_rank[name] for of_rank in of_all) for name in of_all[0]}
            sizes = (f"{most[name] / MB:,.0f} MB" for name in ("total", "held", "blocks", "loading"))
            error = difference(clips[ranks], clips[config.ranks[0]])
            table.add_row(str(ranks), *sizes, f"{most['seconds']:.1f}", f"{error:.0e}")
        Console().print(table)


if __name__ == "__main__":
    main()
