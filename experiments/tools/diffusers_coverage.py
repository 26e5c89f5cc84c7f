"""Put every transformer of the installed diffusers on a mesh, untouched, and compare it with itself on one device.

python -m experiments.tools.diffusers_coverage --ranks 2 3 4 --page docs/diffusers.md

Sizes are tiny and against the mesh: lengths and heads that the ranks do not
divide. Writes markdown.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from experiments.tiny_models.transformers import TINY, Tiny
from experiments.tools.pages import check_page, put_part
from meshdiff.autoshard import Report, parallelize
from meshdiff.autoshard.numerics import difference, float_tensors
from meshdiff.distributed.consensus import is_first_rank
from meshdiff.distributed.launch import end_process, start_ranks
from meshdiff.distributed.mesh import Layout, init_distributed, init_mesh, launched_world_size
from meshdiff.errors import InputError

BOUND = 1e-5
INTRODUCTION = """\
# Transformers of diffusers on a mesh, untouched

What `python -m experiments.tools.diffusers_coverage --ranks {ranks}` finds: every transformer that diffusers exports
and that takes tokens, in a tiny size
([`experiments/tiny_models/transformers`](../experiments/tiny_models/transformers)) with lengths and heads that
the ranks do not divide wherever the class allows it, on processes of one machine. The error is relative to the
untouched model on one device, in L2 norm; FLOPs, attention and collectives are of the largest number of ranks, in a
call of its own shapes. Each is called {calls} times, with other values; "captured" has how many operations the
graph has as which the last calls of a rank run (`capture=True`), or why there is none. "Gathered" names the lines
of code in blocks that needed replicated tensors. An all-gather in `scaled_dot_product_attention` is the `gather`
strategy, which sends least where one head of key and value is for many of query.
"""
CALLS = 7
"""One or two find out what runs how, then one is watched, one captured, one tried, and the last runs as a graph."""
SECONDS = 60
"""That a rank waits for others before it gives up."""


@dataclass(frozen=True)
class Config:
    """Put every transformer of the installed diffusers on a mesh and compare it with itself on one device."""

    ranks: list[int] = field(default_factory=lambda: [2, 3, 4])
    """Numbers of ranks to try, as processes of this machine."""
    only: list[str] = field(default_factory=list)
    """Names of classes; all by default."""
    page: Path | None = None
    """The page to write the table into, whose other parts stay; it is printed by default."""
    to: Path | None = None
    """A file to write what was found to, as JSON lines; it is what the ranks hand over."""


@dataclass(frozen=True)
class Found:
    """The result for one class on one number of ranks."""

    name: str
    ranks: int
    error: float | None = None  # relative to the untouched model; None if it was refused
    refused: str = ""
    share: float = 0.0  # of the floating point operations that ran on shards
    attention: tuple[int, int] = (0, 0)  # self-attentions in blocks on shards, and on replicated tensors
    collectives: dict[str, float] = field(default_factory=dict)  # a block
    gathers: list[str] = field(default_factory=list)  # inside blocks, and what forced them
    replicated_kinds: dict[str, str] = field(default_factory=dict)
    captured: str = ""

    @property
    def is_captured(self) -> bool:
        """True if its last call ran as a graph."""
        return self.captured.startswith("Captured")

    @property
    def is_right(self) -> bool:
        return self.error is not None and self.error <= BOUND

    @property
    def is_sharded(self) -> bool:
        """True if every self-attention ran on shards, and nothing was gathered inside a block."""
        gathered = self.gathers or any(name in self.collectives for name in ("all_gather", "all_reduce"))
        sharded, replicated = self.attention
        return self.is_right and sharded > 0 and not (self.replicated_kinds or gathered or replicated)


def attempt(model: Tiny, mesh: DeviceMesh) -> Found:
    """One class on the mesh, called again and again."""
    module = model.build()
    with torch.no_grad():
        expected = [module(**arguments(model, call)) for call in range(CALLS)]
        assert float_tensors(expected), "the model returns no tensor"
        parallel = parallelize(module, mesh, capture=True)
        try:
            error = max(difference(parallel(**arguments(model, call)), expected[call]) for call in range(CALLS))
        except Exception as refusal:
            if "gloo" in str(refusal):
                raise
            return Found(model.name, mesh.size(), refused=" ".join(str(refusal).split())[:300] or repr(refusal))
    return summary(model.name, error, parallel.report())


def arguments(model: Tiny, call: int) -> dict[str, Any]:
    """Arguments of a call: the first tensor of floating point numbers, which is denoised, differs in each call."""
    given = model.arguments()
    name = next(name for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point())
    return {**given, name: given[name] * (1 + call / 10)}


def summary(name: str, error: float, report: Report) -> Found:
    blocks = [block for block in report.blocks if block.name]
    collectives: dict[str, float] = {}
    for block in blocks:
        for (collective, _), sent in block.sent.items():
            collectives[collective] = collectives.get(collective, 0) + sent.count / len(blocks)
    return Found(
        name,
        report.ranks,
        error,
        share=report.sharded_share,
        attention=(sum(b.attention_sharded for b in blocks), sum(b.attention_replicated for b in blocks)),
        collectives=collectives,
        gathers=sorted(
            {f"{what} ({line})" for block in blocks for what, _, line in block.gathers}
            | {f"{what} ({line}: {line.text})" for block in blocks for what, line in block.sent if what != "all_to_all"}
        ),
        replicated_kinds=report.replicated_kinds,
        captured=report.captured,
    )


def on_ranks(config: Config) -> None:
    """Every class, one after the other; rank 0 writes what came of each."""
    assert config.to is not None
    init_distributed(timedelta(seconds=SECONDS))
    torch.set_num_threads(1)
    mesh = init_mesh(Layout(cp=launched_world_size()), "cpu")["cp"]
    for name in config.only:
        found = attempt(TINY[name], mesh)
        if is_first_rank():
            with config.to.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(found)) + "\n")


def collect(config: Config, ranks: int) -> list[Found]:
    """Every class on that many ranks; ranks that die are started again with what is left."""
    names, found = config.only or sorted(TINY), []
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "found.jsonl"
        to.touch()
        while names:
            start_ranks(ranks, ["-m", __spec__.name, "--to", str(to), "--only", *names])
            found = [Found(**json.loads(line)) for line in to.read_text(encoding="utf-8").splitlines()]
            names = [name for name in names if name not in {one.name for one in found}]
            if names:
                lost = Found(names[0], ranks, refused="a rank died, or did not answer")
                with to.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(vars(lost)) + "\n")
                found, names = [*found, lost], names[1:]
    return found


def cell(found: Found) -> str:
    if found.error is None:
        return "refused"
    return ("" if found.is_right else "WRONG ") + f"{found.error:.0e}"


def table(results: list[list[Found]]) -> str:
    """The table in markdown; columns without a number of ranks are for the largest number of ranks."""
    ranks = [one[0].ranks for one in results]
    errors = " | ".join(f"error, {n} ranks" for n in ranks)
    head = (
        f"| class | {errors} | FLOPs on shards | self-attention on shards | collectives a block | captured | gathered |"
    )
    lines = [head, "|---|" + "---|" * (len(ranks) + 5)]
    for row in zip(*results, strict=True):
        last = row[-1]
        sent = ", ".join(f"{count:.1f} {name}" for name, count in sorted(last.collectives.items())) or "none"
        kinds = last.replicated_kinds.items()
        why = [*last.gathers, *(f"{kind or 'all'} replicated: {reason}" for kind, reason in kinds)]
        on_shards = f"{last.attention[0]} of {sum(last.attention)}"
        notes = "; ".join([*why, last.refused] if last.refused else why).replace("|", "/")
        captured = last.captured.replace("|", "/").partition(": ")[2].removesuffix(", without the Python around them")
        cells = [last.name, *map(cell, row), f"{last.share:.0%}", on_shards, sent, captured, notes]
        lines.append("| " + " | ".join(cells) + " |")
    for one in results:
        right = sum(found.is_right for found in one)
        wrong = sum(found.error is not None and not found.is_right for found in one)
        sharded = sum(found.is_sharded for found in one)
        captured = sum(found.is_captured for found in one)
        lines.append(
            f"\n{one[0].ranks} ranks: {right} of {len(one)} right, {wrong} wrong, {len(one) - right - wrong} refused; "
            f"{sharded} with every self-attention on shards and no gather inside a block, {captured} captured."
        )
    return "\n".join(lines)


def main() -> None:
    config = tyro.cli(Config)
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    if launched_world_size() > 1:
        on_ranks(config)
        end_process(0)
    unknown = set(config.only) - set(TINY)
    if unknown:
        print(f"--only: {', '.join(sorted(unknown))} unknown; known: {', '.join(sorted(TINY))}", file=sys.stderr)
        raise SystemExit(2)
    try:
        check_page(config.page)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    introduction = INTRODUCTION.format(ranks=" ".join(map(str, config.ranks)), calls=CALLS)
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}\n"
    part = "\n".join([introduction, versions, table([collect(config, ranks) for ranks in config.ranks])])
    if config.page is None:
        print(part)
    else:
        put_part(config.page, part)


if __name__ == "__main__":
    main()
