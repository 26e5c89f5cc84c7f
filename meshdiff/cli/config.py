"""The flags of `meshdiff run`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from meshdiff.cli.registry import ModelFlags
from meshdiff.diffusion.request import Request
from meshdiff.distributed.mesh import Layout
from meshdiff.distributed.world import launched_world_size
from meshdiff.errors import InputError
from meshdiff.models import DigitsModel

__all__ = ["Config"]


@dataclass(frozen=True)
class Config(ModelFlags):
    """Make one clip from a prompt, on one device or on many."""

    request: tyro.conf.UseAppendAction[tyro.conf.OmitArgPrefixes[Request]] = field(
        default_factory=lambda: DigitsModel.DEFAULTS
    )
    prompts: str | None = None
    """A list of requests: a prompt a line, or a JSON object a line with any of the request options (with _ for -) and
    a name; - reads it from standard input. The flags are what a line leaves out."""
    resume: bool = False
    """Go on with the list of --prompts in --out: what is complete there is not done again."""
    cp: int | None = None
    """Context parallelism: ranks that share the sequence. By default what --cfg leaves of the world."""
    dp: int | None = None
    """Data parallelism: replicas of --cp x --cfg ranks that take the requests of --prompts in turn. By default as many
    as the requests keep busy."""
    cfg: int | None = None
    """Guidance parallelism: ranks that share the guidance branches. By default 2 if the world is
    even and guidance is on."""
    threads: int = 1
    """CPU threads of each rank. With 1, in float32 and by --strategy ulysses, layouts give the same bits; other
    strategies agree to rounding, and a GEMM that is split between threads adds up in another order."""
    timeout: int | None = None
    """Seconds that a rank waits for another in a collective before it gives up and says so; by default 600 if the
    machine has a GPU or the model needs --checkpoint, as ranks may then load, compile or decode for as long while
    others wait, else 60."""
    out: Path | None = None
    """Folder to write; runs/<time>-<layout> by default."""
    overwrite: bool = False
    """Replace --out if it holds an earlier run."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    """Weights & Biases; offline logs into the run's own folder and needs no account."""
    wandb_project: str = "meshdiff"
    """Weights & Biases project."""

    def flags(self) -> dict[str, object]:
        """All flags with their values."""
        flat = dataclasses.asdict(self)
        request = flat.pop("request")
        flat = {**request.pop("options"), **request, **flat.pop("shape"), **flat}
        return {f"--{name.replace('_', '-')}": value for name, value in flat.items()}

    def layout(self, model: Any, world: int, requests: int) -> Layout:
        """The layout of that many processes, for the branches of the request that the flags describe.

        Raises:
            InputError: if there is none that the flags fit.
        """
        branches, unguided = self.entry.branches(model, self.request), self.entry.unguided(model)
        return Layout.resolve(world, branches, self.cfg, self.cp, self.dp, requests, unguided)

    def check(self) -> None:
        """Raise `InputError` for combinations that cannot work, whatever the layout."""
        self.check_model()
        if self.resume and (self.prompts is None or self.out is None):
            raise InputError("--resume", "goes on with a list: name it with --prompts, and its folder with --out")
        if self.overwrite and self.prompts is not None:
            raise InputError("--overwrite", "is for a single clip; with --prompts, name another --out or add --resume")
        if self.dp is not None and self.dp > 1 and self.prompts is None:
            raise InputError("--dp", "divides the requests of --prompts; one request has nothing to divide")
        if self.simulate and self.compile:
            raise InputError("--compile", "does not work with --simulate; leave one of them out")
        if self.simulate and launched_world_size() > 1:
            raise InputError(
                "--simulate", "simulates every rank in one process; start it with python, not with torchrun"
            )
        if self.timeout is not None and self.timeout < 1:
            raise InputError("--timeout", f"{self.timeout} given, needs at least 1")
        if self.threads < 1:
            raise InputError("--threads", f"{self.threads} given, needs at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda", "this machine has no usable GPU; use --device cpu")
