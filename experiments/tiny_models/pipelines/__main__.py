"""Write a tiny pipeline of random weights: complete, a few megabytes, the same every time.

    python -m experiments.tiny_models.pipelines flux --out tiny-flux

OUT/ is what `diffusers.DiffusionPipeline.from_pretrained` loads.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments.tiny_models.pipelines import PIPELINES, WITH_FILES
from meshdiff.cli.output import output_folder
from meshdiff.errors import InputError

OfText = Literal["wan", "wan22", "ltx", "hunyuan-video", "cogvideox", "mochi", "flux", "sd3", "pixart", "qwen-image"]
OfFiles = Literal["wan-i2v", "wan-v2v", "wan-vace", "flux-inpaint", "flux-control", "stable-audio", "ltx2"]


@dataclass(frozen=True)
class Config:
    """Write a tiny random pipeline."""

    pipeline: tyro.conf.Positional[OfText | OfFiles]
    """The pipeline to write."""
    out: Path
    """Folder to write; must be empty or not exist."""


def write(config: Config) -> None:
    """Save the pipeline into `config.out`, which appears when it is complete.

    Raises:
        InputError: if the folder is not free, or a library is missing.
    """
    with output_folder(config.out) as folder:
        {**PIPELINES, **WITH_FILES}[config.pipeline]().save_pretrained(folder)


def main() -> int:
    """Parse, write, say what to do next; returns the exit code."""
    config = tyro.cli(Config, description=__doc__)
    try:
        write(config)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file())
    print(f"{config.out}: {size / 2**20:.1f} MiB")
    load = f"from diffusers import DiffusionPipeline; print(DiffusionPipeline.from_pretrained({str(config.out)!r}))"
    print(f"try it: python -c {shlex.quote(load)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
