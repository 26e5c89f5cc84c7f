"""Small clips of the embedded model: flags, a list of requests, and what a run of it writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from ranks import EXPERIMENTS
from safetensors.torch import load_file

from meshdiff.cli.run import main

SCRIPT = str(EXPERIMENTS / "run.py")
FLAGS = ("--frames", "8", "--steps", "2", "--wandb", "disabled")
LIST = """a 7 moving left
{"prompt": "a 3 moving up", "seed": 4, "name": "three"}
{"promp": "a 4"}
a 5 moving sideways
{"prompt": "a 2", "steps": 3}
a 1 moving down
"""
NAMES = ["0001-a-7-moving-left", "three", "0005-a-2", "0006-a-1-moving-down"]
FAILED = ["0003-failed", "0004-a-5-moving-sideways"]


def clips(out: Path) -> dict[str, torch.Tensor]:
    return {p.parent.name: load_file(p)["video"] for p in sorted(out.glob("*/video.safetensors"))}


def records(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len({line["name"] for line in lines}) == len(lines)  # once each
    return {line["name"]: line for line in lines}


def video(folder: Path) -> torch.Tensor:
    return load_file(folder / "video.safetensors")["video"]


def list_alone(folder: Path) -> Path:
    """The folder, with the list (list.txt) and what one process makes of it (out)."""
    (folder / "list.txt").write_text(LIST)
    assert main([*FLAGS, "--prompts", str(folder / "list.txt"), "--out", str(folder / "out")]) == 1
    return folder
