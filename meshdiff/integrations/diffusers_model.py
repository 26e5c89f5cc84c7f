"""A folder with any pipeline of diffusers as a model that `experiments/run.py` runs.

The pipeline is the one that diffusers loads from the folder, with its own
scheduler; its transformers, text encoders and VAE are on the mesh, with their
code unchanged.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.strategy import AUTO
from meshdiff.autoshard import Backend
from meshdiff.diffusion.outputs import Outputs
from meshdiff.diffusion.request import Request
from meshdiff.diffusion.seeding import seeded
from meshdiff.distributed.consensus import agreed, is_collective_error
from meshdiff.distributed.mesh import DP, replica
from meshdiff.errors import InputError
from meshdiff.integrations.call_options import CallOptions, option_flag
from meshdiff.integrations.diffusers import parallelize
from meshdiff.integrations.early_check import early_refusal
from meshdiff.integrations.input_files import InputFiles
from meshdiff.integrations.pipeline_options import PipelineOptions
from meshdiff.integrations.pipeline_outputs import EARS, VOICES, frame_rate, outputs_of, sampling_rate
from meshdiff.integrations.pipeline_stages import Stages
from meshdiff.integrations.scheduler_flag import make_scheduler

__all__ = ["DiffusersModel", "DiffusersRun"]

INDEX = "model_index.json"

WHOLE_FOLDER_HINT = (
    "name the folder of a pipeline, as `hf download ID --local-dir FOLDER` or `DiffusionPipeline.save_pretrained` "
    "makes it"
)

SCHEDULER = "pipeline"
"""The solver of every request: the scheduler that the pipeline has."""


class DiffusersModel:
    """A pipeline in a folder.

    Args:
        checkpoint: the folder, as `pipeline.save_pretrained` writes it.

    Raises:
        InputError: if the folder holds no pipeline, or one that takes no prompt.
    """

    DEFAULTS = Request("A cat walking on grass.", options=PipelineOptions())
    """The default request; the pipeline's own defaults hold for the fields that are None."""
    transformers: Sequence[nn.Module] = ()

    def __init__(self, checkpoint: str) -> None:
        self.folder, self.files = Path(checkpoint), InputFiles()
        self._inputs: dict[tuple[str, ...], dict[str, str]] = {}
        try:
            self.index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            self.kind = self.index["_class_name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{self.folder / INDEX} cannot be read ({' '.join(str(error).split())})"
            raise InputError("--checkpoint", f"{reason}; {WHOLE_FOLDER_HINT}") from error
        if not isinstance(getattr(diffusers, str(self.kind), None), type):
            unknown = f"{self.folder} is a {self.kind}, which diffusers {diffusers.__version__} does not have"
            raise InputError("--checkpoint", f"{unknown}; install one that has it, or name another folder")
        if "prompt" not in self.options:
            raise InputError(
                "--checkpoint",
                f"{self.folder} is a {self.kind}, which takes no prompt; name the folder of a pipeline that does",
            )

    @cached_property
    def options(self) -> CallOptions:
        """The parameters of a call of the pipeline."""
        return CallOptions(getattr(diffusers, self.kind))

    @property
    def names(self) -> dict[str, str]:
        """The pipeline's names of options that have another name here."""
        return {"frames": self.options.frames, "steps": "num_inference_steps"}

    @property
    def guided_by(self) -> str:
        """The option that sets the guidance scale."""
        return "true_cfg_scale" if "true_cfg_scale" in self.options else "guidance_scale"

    @property
    def guidance_needs(self) -> str:
        """The condition for two branches of guidance, for an error message."""
        if self.guided_by not in self.options:
            return f"a {self.kind} has no guidance"
        also = " and a --negative-prompt" * (self.guided_by == "true_cfg_scale")
        return f"two need {_flag(self.guided_by)} above 1{also}"

    def unreadable(self, reason: str) -> InputError:
        """The error for a folder in which a file is missing or damaged, with the remedy."""
        return InputError(
            "--checkpoint",
            f"{self.folder} cannot be read ({reason.rstrip('.')}); a file is missing, damaged, or not of diffusers "
            f"{diffusers.__version__}: download the folder again, or name another",
        )

    def branches(self, request: Request) -> int:
        """Number of branches of guidance in a step."""
        name = self.guided_by
        scale = _numbers(request)[name]
        scale = self.options.defaults.get(name) if scale is None else scale
        wanted = name == "guidance_scale" or bool(request.negative_prompt)
        return 2 if wanted and scale is not None and scale > 1 else 1

    def prepare(self, request: Request) -> Request:
        request = replace(request, options=request.options_of(PipelineOptions))
        for name, value in _numbers(request).items():
            if value is not None and self.names.get(name, name) not in self.options:
                raise InputError(_flag(name), f"is no option of a {self.kind}; leave it out")
        if request.negative_prompt and "negative_prompt" not in self.options:
            raise InputError("--negative-prompt", f"is no option of a {self.kind}; leave it out")
        for flag, given in (("--shift", request.shift), ("--solver", request.solver)):
            if given is not None and given != SCHEDULER:
                raise InputError(flag, "is the pipeline's own; leave it out")
        names = request.options_of(PipelineOptions).by_name
        self.options.check_names(names)
        self.options.check_needed(names)
        self.scheduler(request)
        error = early_refusal(getattr(diffusers, self.kind), self.options, self.arguments(request))
        if error is not None:
            raise self.refusal(request, error) from error
        return replace(request, steps=request.steps or self.options.defaults.get(self.names["steps"]), solver=SCHEDULER)

    def scheduler(self, request: Request) -> SchedulerMixin | None:
        """The scheduler of a request, new; None if it is the pipeline's.

        Raises:
            InputError: if it cannot be made.
        """
        text = request.options_of(PipelineOptions).scheduler
        if text is None:
            return None
        try:
            config = json.loads((self.folder / "scheduler" / SCHEDULER_CONFIG_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"--scheduler {text}", f"a {self.kind} has none to be replaced; leave it out") from error
        return make_scheduler(text, config)

    def values(self, request: Request) -> dict[str, Any]:
        """The values of a request's `--option`, with the contents of the files that they name.

        Raises:
            InputError: if a value is none that the pipeline takes, or a file cannot be read.
        """
        options = request.options_of(PipelineOptions)
        rate = sampling_rate(self.folder, EARS) if options.option else None
        values: dict[str, Any] = {}
        self._inputs[options.option] = digests = {}
        for name, text in options.by_name.items():

            def read(file: str, flag: str = option_flag(name, text)) -> Any:
                contents, digests[file] = self.files.read(file, flag, rate)
                return contents

            values[name] = self.options.value(name, text, read)
        return values

    def grid(self, request: Request) -> tuple[int, int, int]:
        """An upper bound of the tokens that the pipeline makes of a request, as only the pipeline knows the sizes."""
        frames, height, width = (getattr(request, name) or 256 for name in ("frames", "height", "width"))
        return frames, height, width

    def inputs(self, request: Request) -> dict[str, str]:
        """The SHA-256 of each file that a request's options name, by its name; `prepare` has read them."""
        return self._inputs.get(request.options_of(PipelineOptions).option, {})

    def arguments(self, request: Request) -> dict[str, Any]:
        """The request as arguments of a call of the pipeline, with the files that its options name.

        Raises:
            InputError: as `values`.
        """
        values = self.values(request)
        given = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, **_numbers(request)}
        in_place = {name for name in ("prompt", "negative_prompt") if f"{name}_embeds" in values}
        flags = {self.names.get(name, name): value for name, value in given.items() if name not in in_place}
        return {**{name: value for name, value in flags.items() if value not in (None, "")}, **values}

    def check_count(self, arguments: dict[str, Any], outputs: Outputs) -> None:
        """Raise `InputError` if the pipeline made fewer than it was asked for, as some do without saying so."""
        made = len(outputs.videos or outputs.audio)
        for name, wanted in arguments.items():
            if re.fullmatch(r"num_\w+_per_prompt", name) and (wanted or 1) > made:
                raise InputError(
                    option_flag(name, wanted), f"a {self.kind} makes {made} whatever is given; leave it out"
                )

    def refusal(self, request: Request, error: ValueError) -> InputError:
        """The error for a request that the pipeline refuses: its message, with flags in place of its option names."""
        words, named = " ".join(str(error).split()), []
        for name, value in _numbers(request).items():
            words, found = re.subn(rf"`?\b{self.names.get(name, name)}\b`?", _flag(name), words, flags=re.IGNORECASE)
            if found and value is not None:
                named.append(_flag(name))
        given = request.options_of(PipelineOptions).by_name
        for name in self.options.names:  # their names are words of their own, so only where they are marked as names
            words, found = re.subn(rf"`{name}`", option_flag(name), words)
            if found and name in given:
                named.append(option_flag(name, given[name]))
        return InputError(", ".join(named) or "--model diffusers", f"a {self.kind} refuses it: {words}")


class DiffusersRun:
    """A pipeline of diffusers on a mesh, with the interface of `meshdiff.Pipeline`.

    Args:
        model: the folder.
        mesh: from `init_mesh`; of one with replicas, this rank's takes part.
        dtype: of weights and activations.
        strategy: of mesh attention.
        capture: run settled calls of the transformers as graphs; see `meshdiff.parallelize`.
        shard_weights, offload, offload_text, shard_text, shard_vae: the place of weights, and what ranks share beside
            the transformers; see `meshdiff.integrations.diffusers.parallelize`.
    """

    def __init__(
        self,
        model: DiffusersModel,
        mesh: DeviceMesh,
        dtype: torch.dtype,
        strategy: str = AUTO,
        capture: bool | Backend = False,
        shard_weights: bool = False,
        offload: bool = False,
        offload_text: bool = False,
        shard_text: bool = True,
        shard_vae: bool = True,
    ) -> None:
        self.model = model
        self.replica = mesh.get_local_rank(DP) if DP in (mesh.mesh_dim_names or ()) else 0
        self.mesh = replica(mesh)
        transformers.utils.logging.disable_progress_bar()
        try:
            # Weights that no file has are drawn by transformers, and no rank nor run is to draw others.
            with seeded(0), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer versions say dtype, older know torch_dtype only
                self.pipeline = DiffusionPipeline.from_pretrained(
                    model.folder, torch_dtype=dtype, local_files_only=True
                )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of whichever library reads a part
            reason = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
            raise model.unreadable(reason) from error
        parts = [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]
        if any(parameter.is_meta for part in parts for parameter in part.parameters()):
            raise model.unreadable("it has no weights for some of its layers")
        options = {"shard_weights": shard_weights, "offload": offload, "offload_text": offload_text}
        options |= {"shard_text": shard_text, "shard_vae": shard_vae}
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            self.parallel = parallelize(self.pipeline, self.mesh, strategy=strategy, capture=capture, **options)
        except ValueError as error:
            raise InputError("--checkpoint", f"{error}; name the folder of a pipeline that has one") from error
        stored = [weights.module for weights in self.parallel.weights.values()]
        for part in parts:  # the others are where they are to be already
            if not any(part is module for module in stored):
                part.to(mesh.device_type)
        self.stages = Stages(self.pipeline)
        self.scheduler = self.pipeline.components.get("scheduler")
        schedulers = [part for part in self.pipeline.components.values() if isinstance(part, SchedulerMixin)]
        self.fresh = [(scheduler, copy.deepcopy(vars(scheduler))) for scheduler in schedulers]

    def generate(
        self,
        request: Request,
        *,
        on_step: Callable[[int], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Outputs:
        """The videos or images of a request, and its audio.

        They depend on the request alone, not on what was made before it nor on any state of a global generator, from
        which many schedulers draw.

        Raises:
            InputError: if the pipeline refuses the request, with its own message, or a file has changed.
        """
        if request.options_of(PipelineOptions).option:
            with agreed(self.mesh):  # a file may have changed on one machine only
                arguments = self.model.arguments(request)
        else:
            arguments = self.model.arguments(request)
        fps = frame_rate(self.model.options, arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[name] = value.to(self.mesh.device_type)
        if on_step is not None:
            arguments |= _told(on_step, self.model.options)
        generator = torch.Generator().manual_seed(request.seed)
        self._refresh_schedulers()
        if self.scheduler is not None:
            self.pipeline.register_modules(scheduler=self.model.scheduler(request) or self.scheduler)
        try:
            with seeded(request.seed), self.stages.reporting(on_stage):
                returned = self.pipeline(**arguments, generator=generator, output_type="pt")
        except ValueError as error:  # sizes it has no use for, say; before anything is sent
            raise self.model.refusal(request, error) from error
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            given = request.options_of(PipelineOptions).by_name
            if self.stages.has_sampled or not given or is_collective_error(error):
                raise
            # What comes before the transformer's first call depends on what is given more than on anything else.
            reason = shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
            flags = ", ".join(option_flag(*pair) for pair in given.items())
            raise InputError(flags, f"a {self.model.kind} fails with this before it samples ({reason})") from error
        outputs = outputs_of(returned, self.model.kind, fps, sampling_rate(self.model.folder, VOICES))
        self.model.check_count(arguments, outputs)
        return outputs

    def _refresh_schedulers(self) -> None:
        """Reset every scheduler to its state after loading.

        Some keep state from one clip to the next: the noise of an earlier clip (CosineDPMSolverMultistep), or a setting
        for an odd number of steps (DPMSolverSinglestep).
        """
        for scheduler, state in self.fresh:  # in place, as parts of a pipeline may share one
            vars(scheduler).clear()
            vars(scheduler).update(copy.deepcopy(state))

    def facts(self, request: Request) -> dict[str, dict[str, str]]:
        """For `metrics.json`: the outcome of capture, where weights are, work on shards; digests of input files."""
        weights = {name: str(stored) for name, stored in self.parallel.weights.items()}
        return {
            "captured": self.parallel.captured(),
            "stored_weights": weights,
            "parts": {name: report.summary for name, report in self.parallel.report().items()},
            "inputs": self.model.inputs(request),
        }

    @staticmethod
    def done(request: Request, outputs: Outputs) -> Request:
        """The request with the sizes that the pipeline chose; None for audio alone."""
        frames, height, width = None, None, None
        if outputs.videos:
            frames, _, height, width = outputs.videos[0].shape
        return replace(request, frames=frames, height=height, width=width)


def _numbers(request: Request) -> dict[str, int | float | None]:
    """Options of a request that a pipeline may have; None where they are left to it."""
    names = ("frames", "height", "width", "steps", "guidance_scale")
    of_options = {"true_cfg_scale": request.options_of(PipelineOptions).true_cfg_scale}
    return {**{name: getattr(request, name) for name in names}, **of_options}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _told(on_step: Callable[[int], None], options: CallOptions) -> dict[str, Any]:
    """Arguments by which a pipeline calls `on_step` at the end of each step; none if it has no way to."""

    def at_end(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step)
        return tensors

    if "callback_on_step_end" in options:
        return {"callback_on_step_end": at_end}
    if "callback" in options and "callback_steps" in options:  # older ones
        return {"callback": lambda step, time, latents: on_step(step), "callback_steps": 1}
    return {}
