"""The work of `run.py` after flags are read and ranks are started: one clip, or a list of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from meshdiff.cli.config import Config
from meshdiff.cli.media import write_outputs
from meshdiff.cli.metrics import RunMetrics, collect
from meshdiff.cli.output import COMPLETE, output_folder, remove_partial
from meshdiff.cli.phases import OTHER, PhaseBars, Phases
from meshdiff.cli.queue import RESULTS, Counter, Record, check_alike, fresh, resume, take_turns
from meshdiff.cli.request_list import Entry
from meshdiff.diffusion.outputs import Outputs
from meshdiff.diffusion.request import Request
from meshdiff.distributed.comms import CommsCounter
from meshdiff.distributed.consensus import agreed, all_gather_object, check_same, is_first_rank
from meshdiff.distributed.launch import report_failure
from meshdiff.distributed.mesh import Layout, init_mesh
from meshdiff.distributed.simulation import simulate
from meshdiff.distributed.world import recall, remember
from meshdiff.errors import InputError
from meshdiff.models import VideoModel
from meshdiff.pipeline import Pipeline, check_strategy, prepare_request


@contextlib.contextmanager
def model_on_mesh(config: Config, layout: Layout, model: Any) -> Iterator[tuple[Any, Phases]]:
    """The model on its mesh, in this world or in a simulated one, and the time that it took to put it there."""
    with simulate(layout.world_size) if config.simulate else contextlib.nullcontext():
        with agreed():
            mesh = init_mesh(layout, config.device_type)
            loading = Phases(config.device_type, "load")
            pipeline = config.entry.run(config, model, mesh)
            loading.begin(OTHER)
        yield pipeline, loading


def generate(
    config: Config,
    layout: Layout,
    pipeline: Any,
    loading: Phases,
    request: Request,
    on_stage: Callable[[str], None],
    on_step: Callable[[int], None],
) -> tuple[Outputs, RunMetrics]:
    """Generate a clip and measure the run, in the same way on every layout."""
    phases = Phases(config.device_type)

    def stage(name: str) -> None:
        phases.on_stage(name)
        on_stage(name)

    def step(number: int) -> None:
        phases.on_step(number)
        on_step(number)

    with CommsCounter(pipeline.mesh) as comms:
        result = pipeline.generate(request, on_step=step, on_stage=stage)
    request, outputs, facts = config.entry.made(pipeline, request, result)
    phases.begin(OTHER)
    metrics = collect(pipeline, request, layout, phases, loading, comms, {**config.of_run(), **facts})
    if not outputs.is_finite:
        raise InputError(
            f"--dtype {metrics.dtype}",
            "the clip is not made of finite numbers; float32 is the safest, and if it is that, a file of weights is "
            "damaged",
        )
    return outputs, metrics


def progress_bar(console: Console) -> Progress:
    """A bar over sampling steps that names the stage, on rank 0 only."""
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not is_first_rank())


def start_wandb(config: Config, layout: Layout, folder: Path, group: str | None = None) -> Any:
    """A W&B run in `folder`, or None."""
    if config.wandb == "disabled":
        return None
    import wandb

    try:
        str(folder.absolute()).encode()  # here, before W&B has logged pages about it
        return wandb.init(
            project=config.wandb_project,
            mode=config.wandb,
            dir=folder,
            name=str(layout),
            group=group,
            config={**{k.lstrip("-"): str(v) for k, v in config.flags().items()}, "layout": dataclasses.asdict(layout)},
            settings=wandb.Settings(silent=True, console="off", init_timeout=20),
        )
    except UnicodeError as error:
        raise InputError(
            f"--wandb {config.wandb}",
            f"W&B takes no folder or flag with letters that this locale ({sys.getfilesystemencoding()}) lacks; "
            "PYTHONUTF8=1 in the environment reads them, --wandb disabled logs nothing",
        ) from error
    except (wandb.errors.Error, OSError) as error:
        reason = str(error).splitlines()[0]
        flags = f"--wandb {config.wandb} --wandb-project {config.wandb_project}"
        raise InputError(flags, f"{reason}; --wandb offline needs no account, --wandb disabled logs nothing") from error


def log_clip(run: Any, metrics: RunMetrics, folder: Path) -> None:
    """Log the time of each step, the clip and the metrics to W&B."""
    import wandb

    for seconds in metrics.seconds_per_step:
        run.log({"seconds_per_step": seconds})
    logged: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".mp4":
            logged[path.stem] = wandb.Video(str(path), format="mp4")
        elif path.suffix == ".png" and path.stem.startswith("image"):
            logged[path.stem] = wandb.Image(str(path))
        elif path.suffix == ".wav":
            logged[path.stem] = wandb.Audio(str(path))
    run.log({**logged, "prompt": metrics.prompt})
    run.summary.update(metrics.as_dict())
    for name in ("seconds_by_phase", "peak_memory_by_phase"):  # a number each, which W&B draws
        of_ranks = getattr(metrics, name)
        run.summary.update(
            {f"{name}/{key}/rank{n}": value for n, of in enumerate(of_ranks) for key, value in of.items()}
        )


def summary(metrics: RunMetrics, out: Path) -> Table:
    """A table of the main metrics, to print after a run."""
    table = Table(show_header=False, title=Text(metrics.prompt), title_style="bold")
    layout = ", ".join(f"{name} {size}" for name, size in metrics.layout.items() if name != "dp")
    played = " (simulated)" if metrics.simulated else ""
    table.add_row("layout", f"{layout}: {metrics.world_size} rank{'s' * (metrics.world_size > 1)}{played}")
    table.add_row("device", f"{metrics.device}, {metrics.threads_per_rank} threads a rank, {metrics.dtype}")
    median = metrics.median_seconds_per_step
    step = "" if median is None else f", median step {median * 1000:.0f} ms"
    table.add_row("time", f"{metrics.seconds_total:.2f} s{step}")
    table.add_row("", PhaseBars(metrics.seconds_by_phase, metrics.peak_memory_by_phase))
    peak, start = (max(ranks) / 2**20 for ranks in (metrics.peak_memory_bytes, metrics.start_memory_bytes))
    table.add_row("memory", f"peak {peak:.0f} MiB a rank, {start:.0f} MiB of it before the clip")
    for dim, collectives in metrics.comms.items():
        for name, traffic in collectives.items():
            sent = f"{traffic['count']} x {name}, {traffic['bytes'] / 2**20:.2f} MiB sent by a rank"
            table.add_row(f"{dim} traffic", sent)
    for name, told in [*metrics.captured.items(), *metrics.stored_weights.items()]:
        table.add_row(name, told)
    table.add_row("written", str(out))
    return table


def write(
    outputs: Outputs, metrics: RunMetrics, wandb_run: Any, folder: Path, device_type: Literal["cpu", "cuda"]
) -> RunMetrics:
    """Write all files of a clip, the last one being that which marks it as complete.

    Returns:
        The metrics with the time of writing, as they are in the files.
    """
    try:
        phases = Phases(device_type, "write")
        write_outputs(outputs, folder)
        phases.begin(OTHER)
        metrics = metrics.written(phases)
        if wandb_run is not None:
            log_clip(wandb_run, metrics, folder)
        (folder / COMPLETE).write_text(json.dumps(metrics.as_dict(), indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError("--out", f"cannot be written ({error})") from error
    return metrics


def output_of_run(config: Config, layout: Layout) -> tuple[Path, Literal["nothing", "begun", "complete"]]:
    """The folder to write, the same on every rank, and its state when torchrun restarted this run."""
    out = config.out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{layout}"
    before: Literal["nothing", "begun", "complete"] = "nothing"
    if is_first_rank() and (earlier := recall("out")) is not None:
        out = Path(earlier)
        before = "complete" if (out / COMPLETE).is_file() and not config.overwrite else "begun"
    return all_gather_object((out, before))[0]


def make_clip(config: Config, layout: Layout, model: Any) -> None:
    """Generate and write one clip; every rank calls this, and only rank 0 prints and writes."""
    console = Console()
    out, before = output_of_run(config, layout)
    if before == "complete":  # a rank was lost between writing and ending
        if is_first_rank():
            console.print(f"{out} is complete")
        return
    with contextlib.ExitStack() as stack:
        with agreed():
            check_strategy(model, layout, config.strategy)
            request = prepare_request(model, config.request, layout)
        check_inputs([config.entry.inputs(model, request)])
        folder, wandb_run = Path(), None
        with agreed():
            if is_first_rank():
                if before == "begun":
                    remove_partial(out)
                folder = stack.enter_context(output_folder(out, config.overwrite))
                remember("out", str(out))
                wandb_run = start_wandb(config, layout, folder)
        with progress_bar(console) as progress:
            task = progress.add_task("loading weights", total=request.steps)
            with model_on_mesh(config, layout, model) as (pipeline, loading):
                outputs, metrics = generate(
                    config,
                    layout,
                    pipeline,
                    loading,
                    request,
                    on_stage=lambda stage: progress.update(task, description=stage),
                    on_step=lambda step: progress.advance(task),
                )
        with agreed():
            if is_first_rank():
                metrics = write(outputs, metrics, wandb_run, folder, config.device_type)
                if wandb_run is not None:
                    wandb_run.finish()
                stack.close()  # the folder takes its name
    if is_first_rank():
        console.print(summary(metrics, out))


def make_clips(config: Config, layout: Layout, model: Any, entries: list[Entry]) -> int:
    """Do a list, each replica a request at a time; returns 1 if some of them failed, else 0."""
    console = Console()
    out, before = output_of_run(config, layout)
    with agreed():
        check_strategy(model, layout, config.strategy)
        ready, refused = split_valid(model, layout, entries)
    errors = {record.line: record.error for record in refused}
    check_alike({entry.line: errors.get(entry.line) for entry in entries})
    check_inputs([config.entry.inputs(model, request) for request in ready.values()])
    with agreed():
        left: list[Entry] = []
        if is_first_rank():
            go_on = config.resume or before == "begun"
            left = begin_list(out, go_on, config, model, ready, refused)
            console.print(f"{layout}: {layout.reason(max(1, len(ready)))}")
            if len(left) < len(ready):
                console.print(f"{len(ready) - len(left)} of {len(entries)} are complete in {out}")
    # The longest first: what replicas do last, while others may have nothing left to do, is then short.
    left = sorted(all_gather_object(left)[0], key=lambda entry: -estimated_cost(model, ready[entry]))
    failures = Counter("failures")
    with model_on_mesh(config, layout, model) as (pipeline, loading), progress_bar(console) as progress:
        start, first = time.perf_counter(), is_first_rank(pipeline.mesh)
        together = SharedProgress(progress, first, len(left), sum(ready[entry].steps or 1 for entry in left))
        with wandb_of_list(config, layout, out, first and bool(left)) as wandb_run:
            for item in take_turns(pipeline.mesh, len(left), Counter("next")):
                entry = left[item]
                try:
                    make_entry(config, layout, pipeline, loading, entry, ready[entry], out, wandb_run, together.on_step)
                except InputError as error:
                    if first:
                        failures.add(1)
                        Record(entry.line, entry.name, "failed", str(error), replica=pipeline.replica).append(out)
                together.finished_one()
        together.wait()
        seconds = time.perf_counter() - start
    failed = len(refused) + failures.add(0)
    if failed:
        report_failure(f"{failed} of {len(entries)} requests failed; {out / RESULTS} says why")
    if is_first_rank():
        console.print(f"{len(left)} requests in {seconds:.1f} s; {failed} of {len(entries)} failed: {out / RESULTS}")
    return 1 if failed else 0


def split_valid(model: VideoModel, layout: Layout, entries: list[Entry]) -> tuple[dict[Entry, Request], list[Record]]:
    """The requests that can be done, with nothing left open, and a record of each that cannot."""
    ready, refused = {}, []
    for entry in entries:
        try:
            if entry.request is None:
                raise InputError("line", entry.error or "")
            ready[entry] = prepare_request(model, entry.request, layout)
        except InputError as error:
            refused.append(Record(entry.line, entry.name, "failed", entry.error or str(error)))
    return ready, refused


def estimated_cost(model: VideoModel, request: Request) -> int:
    """Relative time of a request: the number of tokens that pass through the transformer."""
    return math.prod(model.grid(request)) * (request.steps or 1) * len(request.branches)


def check_inputs(inputs: Iterable[Mapping[str, str]]) -> None:
    """Raise `InputError` on every rank if a file that a request names is not the same on all of them; a collective."""
    check_same({f"{name} of --option": digest for files in inputs for name, digest in files.items()})


def begin_list(
    out: Path, go_on: bool, config: Config, model: Any, ready: dict[Entry, Request], refused: list[Record]
) -> list[Entry]:
    """Make the folder of a list, or repair that of a list to be continued; returns the entries still to be done."""
    if not (go_on and out.is_dir()):
        fresh(out)
    remember("out", str(out))
    left = resume(out, ready, config.of_model(), lambda request: config.entry.inputs(model, request))
    for record in refused:
        record.append(out)
    return left


@contextlib.contextmanager
def wandb_of_list(config: Config, layout: Layout, out: Path, wanted: bool) -> Iterator[Any]:
    """A W&B run for the clips of a replica, or None; the runs of a list are in one group."""
    with agreed():  # the ranks that have none would wait for one that could not start its own
        run = start_wandb(config, layout, out, group=out.name) if wanted else None
    yield run
    if run is not None:
        run.finish()


def make_entry(
    config: Config,
    layout: Layout,
    pipeline: Pipeline,
    loading: Phases,
    entry: Entry,
    request: Request,
    out: Path,
    wandb_run: Any,
    on_step: Callable[[int], None],
) -> None:
    """Generate and write one clip of a list; every rank of a replica calls this.

    Raises:
        InputError: on all of them, if it cannot be done.
    """
    first = is_first_rank(pipeline.mesh)
    with contextlib.ExitStack() as stack:
        folder = Path()
        with agreed(pipeline.mesh):
            if first:
                folder = stack.enter_context(output_folder(out / entry.name))
        outputs, metrics = generate(config, layout, pipeline, loading, request, lambda stage: None, on_step)
        with agreed(pipeline.mesh):
            if first:
                write(outputs, metrics, wandb_run, folder, config.device_type)
                stack.close()
    if first:
        Record(entry.line, entry.name, "ok", seconds=metrics.seconds_total, replica=pipeline.replica).append(out)


class SharedProgress:
    """A progress bar for all replicas, which report through counters, so that none waits for another."""

    def __init__(self, progress: Progress, first: bool, requests: int, steps: int) -> None:
        self.progress, self.first, self.requests = progress, first, requests
        self.task = progress.add_task("", total=steps)
        self.steps, self.done = Counter("steps"), Counter("done")
        self._show(0)

    def on_step(self, step: int) -> None:
        if self.first:
            self._show(self.steps.add(1))

    def finished_one(self) -> None:
        if self.first:
            self.done.add(1)
            self._show(self.steps.add(0))

    def wait(self) -> None:
        """Wait until every request is done or has failed; replicas may take much longer than any time-out."""
        while self.done.add(0) < self.requests:
            time.sleep(0.1)
            self._show(self.steps.add(0))
        self._show(self.steps.add(0))

    def _show(self, steps: int) -> None:
        description = f"{self.done.add(0)} of {self.requests} requests"
        self.progress.update(self.task, completed=steps, description=description)
