"""Put autoencoders of diffusers on a mesh, untouched, and compare what they decode and encode with one device.

python -m experiments.tools.autoencoders_coverage --ranks 2 3 4 --page docs/diffusers.md

Sizes are tiny, and the ranks do not divide their rows. Writes markdown.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro

from experiments.tiny_models.autoencoders import AUTOENCODERS
from experiments.tools.pages import check_page, put_part
from meshdiff.autoshard import parallelize
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.comms import CommsCounter
from meshdiff.distributed.consensus import is_first_rank
from meshdiff.distributed.launch import end_process, start_ranks
from meshdiff.distributed.mesh import Layout, init_mesh, launched_world_size
from meshdiff.distributed.simulation import outside, unwrap
from meshdiff.errors import InputError
from meshdiff.integrations.diffusers import rows_of

BOUND = 1e-5
INTRODUCTION = """\
# Autoencoders of diffusers on a mesh, untouched

What `python -m experiments.tools.autoencoders_coverage --ranks {ranks}` finds: the autoencoders that pipelines of
diffusers decode and encode with, in a tiny size
([`experiments/tiny_models/autoencoders.py`](../experiments/tiny_models/autoencoders.py)) of 7 rows of latents, on
processes of one machine. The error is the largest of three calls, relative to the untouched model on one device, in L2
norm; collectives are those of a whole call on the largest number of ranks. Convolutions exchange the rows next to a
rank's own, group norms the moments of theirs. "Gathered" names functions that needed replicated tensors.
"""


@dataclass(frozen=True)
class Config:
    """Put autoencoders of the installed diffusers on a mesh and compare them with themselves on one device."""

    ranks: list[int] = field(default_factory=lambda: [2, 3, 4])
    """Numbers of ranks to try, as processes of this machine."""
    page: Path | None = None
    """The page to write the table into, whose other parts stay; it is printed by default."""
    to: Path | None = None
    """A file to write what was found to; it is what the ranks hand over."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of three calls of a decoder or an encoder.

    Attributes:
        error: the largest relative error of them.
        share: the part of its work that ran on shards.
        replicated: functions and kinds of blocks that ran on replicated tensors.
        sent: traffic of the last one, by collective.
    """

    error: float
    share: float
    replicated: list[str]
    sent: dict[str, Any]


def outcomes(name: str, mesh: Any) -> dict[str, Outcome]:
    """Decode and encode on one device, then on a mesh."""
    tiny, found = AUTOENCODERS[name], {}
    with outside():
        model = tiny.build()
        expected = {"decoder": tiny.decode(model), "encoder": tiny.encode(model)}
    for part, run in (("decoder", tiny.decode), ("encoder", tiny.encode)):
        parallel = parallelize(getattr(model, part), mesh, dim=rows_of(getattr(model, part)))
        errors = [difference(unwrap(run(model)), expected[part]) for _ in range(2)]
        with CommsCounter(mesh) as comms:
            errors.append(difference(unwrap(run(model)), expected[part]))
        report = parallel.report()
        replicated = [*report.replicated_kinds, *(f"{row['function']} ({row['line']})" for row in report.gathers())]
        found[part] = Outcome(max(errors), report.sharded_share, replicated, comms.as_dict()["cp"])
        parallel.remove()
    return found


def collect(ranks: int) -> dict[str, dict[str, Outcome]]:
    """All of them on that many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "found.pt"
        start_ranks(ranks, ["-m", __spec__.name, "--to", str(to)])
        found: dict[str, dict[str, Outcome]] = torch.load(to, weights_only=False)
        return found


def on_ranks(to: Path) -> None:
    """All of them, one after the other; rank 0 writes what came of each."""
    torch.set_num_threads(1)
    mesh = init_mesh(Layout(cp=launched_world_size()), "cpu")["cp"]
    found = {name: outcomes(name, mesh) for name in AUTOENCODERS}
    if is_first_rank():
        torch.save(found, to)


def table(results: dict[int, dict[str, dict[str, Outcome]]]) -> str:
    """The table in markdown; columns without a number of ranks are for the largest number of ranks."""
    errors = " | ".join(f"{half}, {ranks} ranks" for half in ("decode", "encode") for ranks in results)
    lines = [f"| class | {errors} | FLOPs on shards | collectives to decode | gathered |"]
    lines.append("|---|" + "---|" * (2 * len(results) + 3))
    last = results[max(results)]
    for name, of_last in last.items():
        found = [results[ranks][name][half].error for half in ("decoder", "encoder") for ranks in results]
        share = min(outcome.share for outcome in of_last.values())
        sent = ", ".join(f"{traffic['count']} {kind}" for kind, traffic in sorted(of_last["decoder"].sent.items()))
        gathered = "; ".join(sorted({row for outcome in of_last.values() for row in outcome.replicated}))
        cells = [name, *(f"{'' if error <= BOUND else 'WRONG '}{error:.0e}" for error in found), f"{share:.0%}"]
        lines.append("| " + " | ".join([*cells, sent, gathered]) + " |")
    return "\n".join(lines)


def main() -> None:
    config = tyro.cli(Config)
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    if config.to is not None:
        on_ranks(config.to)
        end_process(0)
    try:
        check_page(config.page)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    introduction = INTRODUCTION.format(ranks=" ".join(map(str, config.ranks)))
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}\n"
    part = "\n".join([introduction, versions, table({ranks: collect(ranks) for ranks in config.ranks})])
    if config.page is None:
        print(part)
    else:
        put_part(config.page, part)


if __name__ == "__main__":
    main()
