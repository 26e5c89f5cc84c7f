"""Run every scheduler of the installed diffusers with one seed on one rank and on several, and compare the clips.

python -m experiments.tools.schedulers_coverage --page docs/diffusers.md

Each is put into the folders of tiny pipelines, which are then run as `run.py --model diffusers` runs them. Takes
some tens of minutes on two cores. Two of them need torchsde, which nothing else here does.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import tyro
from diffusers import SchedulerMixin
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from experiments.tiny_models.pipelines import PIPELINES
from experiments.tools.pages import check_page, put_part
from meshdiff.autoshard.numerics import difference
from meshdiff.cli.registry import import_diffusers
from meshdiff.diffusion.request import Request
from meshdiff.distributed.consensus import all_gather_object, is_first_rank
from meshdiff.distributed.launch import end_process, start_ranks
from meshdiff.distributed.mesh import Layout, init_distributed, init_mesh
from meshdiff.errors import InputError
from meshdiff.integrations import diffusers_model as pipelines
from meshdiff.pipeline import prepare_request

PAGE = """\
## Schedulers

What `python -m experiments.tools.schedulers_coverage --page docs/diffusers.md` finds: every scheduler that diffusers
exports, {steps} steps of `--model diffusers --seed 0` with it on processes of one machine, in tiny pipelines
([`experiments/tiny_models/pipelines`](../experiments/tiny_models/pipelines)):

- Wan calls its transformer once for each guidance branch and gives its scheduler no generator. Its model predicts a
  flow; schedulers that can are set to (`use_flow_sigmas`).
- Stable Diffusion 3 doubles the batch and gives its scheduler no generator either. It asks for less of its
  scheduler, and is for those that do not fit Wan.
- PixArt-alpha doubles the batch and gives its scheduler the generator of the call. Its model predicts noise.
- CogVideoX is for the schedulers made for it.

A scheduler in a pipeline of another kind makes no picture worth looking at, but has to make the same one. "Global
draws" names the pipelines in which it draws from a global generator, which `run.py` seeds: without that, the clip was
another one. "Twice" compares the clips of two starts of one layout, with other states of all global generators, and
"after another" the clips of one start, before and after one of another seed and number of steps; both are the largest
of all layouts. The error is relative to the clip of one rank. All are in L2 norm, the largest of the pipelines;
"equal" is equal to the bit.

diffusers {diffusers}, torch {torch}, {torchsde}

{table}

{summary}

Not run:

{missing}
"""
BOUND = 1e-4
LAYOUTS = {
    "1 rank": Layout(),
    "cp 2": Layout(cp=2),
    "cfg 2": Layout(cfg=2),
    "cfg 2 x cp 2": Layout(cfg=2, cp=2),
}
ALONE = next(iter(LAYOUTS))
STARTS = 2
STEPS, OTHER_STEPS = 4, 5
SECONDS = 120
"""Seconds that a rank waits for others before it gives up."""
REQUEST = {"prompt": "a small cat", "negative_prompt": "a dog", "height": 80, "width": 112, "guidance_scale": 4.0}
REQUESTS: dict[str, dict[str, Any]] = {"wan": {"frames": 5}, "sd3": {}, "pixart": {}, "cogvideox": {"frames": 5}}
"""Additional options of each pipeline's request."""
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{}, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}],
    "DPMSolverMultistepScheduler": [{}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}],
    "DPMSolverSinglestepScheduler": [{}, {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}],
    "EDMDPMSolverMultistepScheduler": [{}, {"algorithm_type": "sde-dpmsolver++"}],
    "EulerDiscreteScheduler": [{}, {"use_karras_sigmas": True}],
    "FlowMatchEulerDiscreteScheduler": [{}, {"stochastic_sampling": True}],
    "PNDMScheduler": [{}, {"skip_prk_steps": True}],
    "SASolverScheduler": [{}, {"algorithm_type": "noise_prediction"}],
}
"""Settings to try for schedulers that have several algorithms."""
TOKENS = "samples discrete tokens, which no model of latents predicts"
REASONS = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DDPMWuerstchenScheduler": "has no `order`, which these pipelines ask for; its model is a UNet",
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "HeliosDMDScheduler": "has times for each stage of Helios's pyramid of sizes, and none for a pipeline without",
    "HeliosScheduler": "has times for each stage of Helios's pyramid of sizes, and none for a pipeline without",
    "KarrasVeScheduler": "its step takes two noise levels and the sample with noise added, of a UNet's pipeline",
    "PiflowScheduler": "takes the policy that a pi-Flow model predicts: several channels for one",
    "RePaintScheduler": "its step takes the image to fill in, and a mask",
    "RFD4ProteinaScheduler": "samples the coordinates of a protein's atoms",
    "SCMScheduler": "has one time more than steps, which only Sana-Sprint's pipeline leaves out",
    "ScoreSdeVeScheduler": "has two kinds of step, for a UNet's pipeline, and no `step`",
    "UnCLIPScheduler": "has no `order`, which these pipelines ask for; its models are unCLIP's",
    "VQDiffusionScheduler": TOKENS,
}
"""Reasons why schedulers fit none of the pipelines; for others the table has the error that they raise."""


@dataclass(frozen=True)
class Case:
    """A scheduler in a pipeline."""

    scheduler: str
    settings: dict[str, Any]
    pipeline: str
    folder: str

    @property
    def name(self) -> str:
        """The name of the scheduler, with its settings."""
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return self.scheduler + (f" ({settings})" if settings else "")


@dataclass(frozen=True)
class Config:
    """Run every scheduler of the installed diffusers with one seed on several layouts and compare the clips."""

    page: Path | None = None
    """The page to write the table into, whose other parts stay; it is printed by default."""
    only: list[str] = field(default_factory=list)
    """Names of classes; all by default."""
    cases: Path | None = None
    """A file of what to run, as JSON; it and the flags below are what the ranks are handed."""
    layout: str = ALONE
    """Name of a layout in the table."""
    start: int = 0
    """Number of the start of that layout, 0 or 1; in the first, the clip is made again after another one."""


def scheduler_names() -> list[str]:
    """Every scheduler that diffusers exports; those whose libraries are missing, too."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    return [name for name in names if isinstance(getattr(diffusers, name), type)]


def make_cases(only: list[str], root: Path) -> tuple[list[Case], dict[str, str]]:
    """Folders to run, and the reason of every scheduler that cannot be made."""
    for pipeline in REQUESTS:
        PIPELINES[pipeline]().save_pretrained(root / pipeline)
    cases, reasons = [], {}
    for name in only or scheduler_names():
        kind = getattr(diffusers, name)
        own = ["cogvideox"] if name.startswith("CogVideoX") else [p for p in REQUESTS if p != "cogvideox"]
        for settings in VARIANTS.get(name, [{}]):
            for pipeline in own:
                case = Case(name, settings, pipeline, str(root / f"case-{len(cases)}"))
                try:
                    put_scheduler(case, kind, root / pipeline)
                except (ImportError, TypeError) as error:
                    reasons[name] = one_line(error)
                else:
                    cases.append(case)
    return cases, reasons


def put_scheduler(case: Case, kind: type[SchedulerMixin], pipeline: Path) -> None:
    """Write the folder of a pipeline with another scheduler; the rest are links."""
    known = inspect.signature(kind.__init__).parameters
    flow = FLOW if case.pipeline in ("wan", "sd3") and "use_flow_sigmas" in known else {}
    scheduler = kind(**{key: value for key, value in flow.items() if key in known} | case.settings)
    folder = Path(case.folder)
    folder.mkdir()
    for part in pipeline.iterdir():
        if part.name not in ("scheduler", pipelines.INDEX):
            (folder / part.name).symlink_to(part)
    index = json.loads((pipeline / pipelines.INDEX).read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", case.scheduler]
    (folder / pipelines.INDEX).write_text(json.dumps(index), encoding="utf-8")
    scheduler.save_pretrained(folder / "scheduler")


def on_ranks(config: Config) -> None:
    """Every case on this world; rank 0 writes the clip of each, or what it raised."""
    assert config.cases is not None
    layout = LAYOUTS[config.layout]
    if layout.world_size > 1:
        init_distributed(timedelta(seconds=SECONDS))
    torch.set_num_threads(1)
    import_diffusers()
    mesh = init_mesh(layout, "cpu")
    for case in json.loads(config.cases.read_text(encoding="utf-8")):
        found = attempt(Case(**case), layout, mesh, config.start)
        if is_first_rank():
            torch.save(found, result(Case(**case), config.layout, config.start))


def attempt(case: Case, layout: Layout, mesh: DeviceMesh, start: int) -> dict[str, Any]:
    """Run one case: its clip, the same clip after another one, and, on one rank, True if it uses global generators."""
    try:
        model = pipelines.DiffusersModel(case.folder)
        request = Request(**REQUEST, **REQUESTS[case.pipeline])
        request = prepare_request(model, replace(request, steps=STEPS), layout)
        run = pipelines.DiffusersRun(model, mesh, torch.float32)
        clip = made(run, request)
        found = {"clip": clip, "finite": bool(clip.isfinite().all())}
        if not start:
            made(run, replace(request, seed=1, steps=OTHER_STEPS))
            found["after"] = made(run, request)
        if layout.world_size == 1 and not start:
            with mock.patch.object(pipelines, "seeded", contextlib.nullcontext):
                found["draws"] = not torch.equal(made(run, request), clip)
    except Exception as error:  # of whichever part of diffusers does not fit
        if "gloo" in str(error):
            raise
        return {"error": one_line(error)}
    clips = all_gather_object(clip)
    return {**found, "apart": max(difference(other, clip) for other in clips)}


def made(run: pipelines.DiffusersRun, request: Request) -> Tensor:
    """A clip, with all global generators in states of their own on every rank, as if each had done other things."""
    torch.seed()
    random.seed()
    np.random.seed()
    return run.generate(request).videos[0]


def result(case: Case, layout: str, start: int) -> Path:
    return Path(case.folder) / f"{layout.replace(' ', '-')}-{start}.pt"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def run_cases(cases: list[Case], layout: str, start: int, root: Path) -> None:
    """Every case on a layout; ranks that die are started again with what is left."""
    while cases:
        (root / "cases.json").write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
        flags = ["--cases", str(root / "cases.json"), "--layout", layout, "--start", str(start)]
        start_ranks(LAYOUTS[layout].world_size, ["-m", __spec__.name, *flags])
        cases = [case for case in cases if not result(case, layout, start).exists()]
        if cases:
            torch.save({"error": "a rank died, or did not answer"}, result(cases[0], layout, start))


@dataclass(frozen=True)
class Found:
    """The results of a scheduler in all pipelines that it fits."""

    name: str
    pipelines: list[str]
    draws: list[str]  # the pipelines in which a global generator counts
    twice: float  # the largest difference of two starts of one layout, or of two ranks
    after: float  # the largest difference that a clip before it makes
    errors: dict[str, float]  # of each layout, relative to one rank
    failures: list[str]  # on layouts, of what one rank does

    @property
    def is_right(self) -> bool:
        return not self.failures and self.twice == 0 and max(self.after, *self.errors.values()) <= BOUND


def found_of(name: str, cases: list[Case]) -> Found:
    """One row of the table."""
    twice, after, errors, failures = 0.0, 0.0, dict.fromkeys(list(LAYOUTS)[1:], 0.0), []
    draws = [case.pipeline for case in cases if torch.load(result(case, ALONE, 0))["draws"]]
    for case in cases:
        expected = torch.load(result(case, ALONE, 0))["clip"]
        for layout in LAYOUTS:
            starts = [torch.load(result(case, layout, start)) for start in range(STARTS)]
            wrong = [start["error"] for start in starts if "error" in start]
            if wrong:
                failures.append(f"{case.pipeline}, {layout}: {wrong[0]}")
                continue
            clips = [start["clip"] for start in starts]
            twice = max(twice, *(start["apart"] for start in starts), difference(clips[1], clips[0]))
            after = max(after, difference(starts[0]["after"], clips[0]))
            if layout != ALONE:
                errors[layout] = max(errors[layout], difference(clips[0], expected))
    return Found(name, [case.pipeline for case in cases], draws, twice, after, errors, failures)


def number(error: float) -> str:
    return "equal" if error == 0 else ("" if error <= BOUND else "WRONG ") + f"{error:.0e}"


def table(rows: list[Found]) -> str:
    """The table in markdown."""
    cells = [["scheduler", "pipelines", "global draws", "twice", "after another", *list(LAYOUTS)[1:]]]
    cells.append(["---"] * len(cells[0]))
    for row in rows:
        twice = "equal" if row.twice == 0 else f"WRONG {row.twice:.0e}"
        failures = "; ".join(f"WRONG {failure}" for failure in row.failures).replace("|", "/")
        named = [row.name, ", ".join(row.pipelines), ", ".join(row.draws), failures or twice, number(row.after)]
        cells.append([*named, *map(number, row.errors.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def summary(rows: list[Found], classes: int, left_out: int) -> str:
    right = sum(row.is_right for row in rows)
    drawing = sum(bool(row.draws) for row in rows)
    exact = sum(row.is_right and not any((row.after, *row.errors.values())) for row in rows)
    return (
        f"{classes} schedulers; {left_out} fit none of the pipelines, the others are {len(rows)} rows with their "
        f"settings: {right} make the same clip on every layout and every time, {len(rows) - right} do not. {exact} are "
        f"equal to the bit in all of it. {drawing} draw from a global generator."
    )


def compare(only: list[str], root: Path) -> str:
    """The part of the page."""
    cases, reasons = make_cases(only, root)
    run_cases(cases, ALONE, 0, root)
    fits = []
    for case in cases:
        found = torch.load(result(case, ALONE, 0))
        if found.get("finite"):
            fits.append(case)
        else:
            reasons.setdefault(case.scheduler, found.get("error", "makes numbers that are not finite"))
    in_wan = {case.name for case in fits if case.pipeline == "wan"}
    fits = [case for case in fits if case.pipeline != "sd3" or case.name not in in_wan]
    for layout in LAYOUTS:
        for start in range(STARTS):
            if (layout, start) != (ALONE, 0):
                run_cases(fits, layout, start, root)
    rows = [
        found_of(name, [case for case in fits if case.name == name]) for name in dict.fromkeys(c.name for c in fits)
    ]
    ran = {case.scheduler for case in fits}
    names = only or scheduler_names()
    missing = {name: REASONS.get(name, reasons.get(name)) for name in names if name not in ran}
    return PAGE.format(
        steps=STEPS,
        diffusers=diffusers.__version__,
        torch=torch.__version__,
        torchsde=f"torchsde {version('torchsde')}" if find_spec("torchsde") else "no torchsde",
        table=table(rows),
        summary=summary(rows, len(names), len(missing)),
        missing="\n".join(f"- {name}: {reason}." for name, reason in missing.items()) or "- none.",
    )


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    if config.cases is not None:
        on_ranks(config)
        end_process(0)
    try:
        unknown = sorted(set(config.only) - set(scheduler_names()))
        if unknown:
            raise InputError("--only", f"{', '.join(unknown)} unknown; known: {', '.join(scheduler_names())}")
        check_page(config.page)
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        part = compare(config.only, Path(folder))
    if config.page is None:
        print(part)
    else:
        put_part(config.page, part)


if __name__ == "__main__":
    main()
