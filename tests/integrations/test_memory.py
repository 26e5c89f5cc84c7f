"""Host memory of ranks that load a pipeline whose weights are divided between them."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from ranks import run_on_every_rank

from experiments.tiny_models.pipelines import PIPELINES
from meshdiff import Layout, init_mesh
from meshdiff.integrations.diffusers_model import DiffusersModel, DiffusersRun

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pipeline of which the transformer is large, in two files."""
    path = tmp_path_factory.mktemp("pipeline")
    pipeline = PIPELINES["wan"]()
    pipeline.save_pretrained(path)
    small = pipeline.transformer.config
    shutil.rmtree(path / "transformer")
    large = WanTransformer3DModel(
        **{**small, "num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 16}
    )
    large.save_pretrained(path / "transformer", max_shard_size="120MB")
    return path


def anonymous() -> int:
    """Bytes of memory of this process that are not those of a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
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


def load(folder: Path) -> dict[str, int]:
    mesh = init_mesh(Layout(1, dist.get_world_size()), "cpu")
    with peak() as grown:
        run = DiffusersRun(DiffusersModel(str(folder)), mesh, torch.float32, shard_weights=True)
    stored = run.parallel.weights["transformer"]
    return {"grown": grown[0], "stored": stored.stored_bytes, "all": stored.nbytes, "largest": stored.largest}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_rank_that_loads_holds_its_part_and_little_more(folder, tmp_path):
    for rank in run_on_every_rank(load, 4, tmp_path, folder):
        assert rank["all"] > 200 * MIB
        assert rank["stored"] <= rank["all"] / 4 + MIB
        assert rank["stored"] <= rank["grown"] <= rank["stored"] + 2 * rank["largest"] + 20 * MIB
