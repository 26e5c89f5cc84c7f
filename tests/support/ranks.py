"""Runs a check of `on_ranks.py` on real gloo processes and brings its results back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
SUPPORT = Path(__file__).parent
PROGRAM = Path(__file__).with_name("on_ranks.py")


def torchrun(
    world_size: int, *command: str, timeout: float = 300, cwd: Path | None = None, restarts: int = 0
) -> subprocess.CompletedProcess:
    """A real torchrun on this machine, one thread a rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    launcher += ["--max-restarts", str(restarts)]
    return subprocess.run(
        [*launcher, *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)])},
    )


def run_on_ranks(check: str, world_size: int, folder: Path):
    """What `check` of `on_ranks.py` returned on rank 0 of that many processes."""
    result = folder / f"{check}.pt"
    process = torchrun(world_size, str(PROGRAM), check, str(result))
    assert process.returncode == 0, f"exit code {process.returncode}\n{process.stderr[-6000:]}"
    return torch.load(result, weights_only=False)
