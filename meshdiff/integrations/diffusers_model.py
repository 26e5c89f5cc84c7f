"""A folder with any pipeline of diffusers as a model that `experiments/run.py` runs.

The pipeline is the one that diffusers loads from the folder, with its own
scheduler; its transformers, text encoders and VAE are on the mesh, with their
code unchanged.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.strategy import AUTO
from meshdiff.autoshard import Backend
from meshdiff.diffusion.request import Options, Request
from meshdiff.diffusion.seeding import seeded
from meshdiff.distributed.mesh import DP, replica
from meshdiff.errors import InputError
from meshdiff.integrations.diffusers import parallelize

__all__ = ["DiffusersModel", "DiffusersRun", "PipelineOptions"]

INDEX = "model_index.json"

WHOLE_FOLDER_HINT = (
    "name the folder of a pipeline, as `hf download ID --local-dir FOLDER` or `DiffusionPipeline.save_pretrained` "
    "makes it"
)

NAMES = {"frames": "num_frames", "steps": "num_inference_steps"}
"""The pipelines' names of options that have another name here."""

SCHEDULER = "pipeline"
"""The solver of every request: the scheduler that the pipeline has."""


@dataclass(frozen=True)
class PipelineOptions(Options):
    """Options of requests for pipelines of diffusers."""

    true_cfg_scale: float | None = None
    """The guidance scale of pipelines that have guidance beside one that is trained in (FLUX, Qwen-Image)."""

    @property
    def more_scales(self) -> tuple[float, ...]:
        return () if self.true_cfg_scale is None else (self.true_cfg_scale,)


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
    fps = 16

    def __init__(self, checkpoint: str) -> None:
        self.folder = Path(checkpoint)
        try:
            self.kind = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["_class_name"]
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
    def options(self) -> dict[str, Any]:
        """The parameters of a call of the pipeline, with their defaults."""
        parameters = inspect.signature(getattr(diffusers, self.kind).__call__).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

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
        scale = self.options.get(name) if scale is None else scale
        wanted = name == "guidance_scale" or bool(request.negative_prompt)
        return 2 if wanted and scale is not None and scale > 1 else 1

    def prepare(self, request: Request) -> Request:
        request = replace(request, options=request.options_of(PipelineOptions))
        for name, value in _numbers(request).items():
            if value is not None and NAMES.get(name, name) not in self.options:
                raise InputError(_flag(name), f"is no option of a {self.kind}; leave it out")
        if request.negative_prompt and "negative_prompt" not in self.options:
            raise InputError("--negative-prompt", f"is no option of a {self.kind}; leave it out")
        for flag, given in (("--shift", request.shift), ("--solver", request.solver)):
            if given is not None and given != SCHEDULER:
                raise InputError(flag, "is the pipeline's own; leave it out")
        return replace(request, steps=request.steps or self.options.get(NAMES["steps"]), solver=SCHEDULER)

    def grid(self, request: Request) -> tuple[int, int, int]:
        """An upper bound of the tokens that the pipeline makes of a request, as only the pipeline knows the sizes."""
        frames, height, width = (getattr(request, name) or 256 for name in ("frames", "height", "width"))
        return frames, height, width

    def arguments(self, request: Request) -> dict[str, Any]:
        """The request as arguments of a call of the pipeline."""
        given = {"prompt": request.prompt, "negative_prompt": request.negative_prompt, **_numbers(request)}
        return {NAMES.get(name, name): value for name, value in given.items() if value not in (None, "")}

    def refusal(self, request: Request, error: ValueError) -> InputError:
        """The error for a request that the pipeline refuses: its message, with flags in place of its option names."""
        words, named = " ".join(str(error).split()), []
        for name, value in _numbers(request).items():
            words, found = re.subn(rf"`?\b{NAMES.get(name, name)}\b`?", _flag(name), words, flags=re.IGNORECASE)
            if found and value is not None:
                named.append(_flag(name))
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
        schedulers = [part for part in self.pipeline.components.values() if isinstance(part, SchedulerMixin)]
        self.fresh = [(scheduler, copy.deepcopy(vars(scheduler))) for scheduler in schedulers]

    def generate(
        self,
        request: Request,
        *,
        on_step: Callable[[int], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Tensor:
        """A clip `[frames, channels, height, width]` in [-1, 1]; an image is a clip of one frame.

        It depends on the request alone, not on what was made before it nor on any state of a global generator, from
        which many schedulers draw.

        Raises:
            InputError: if the pipeline refuses the request, with its own message.
        """
        arguments = self.model.arguments(request)
        if on_stage is not None:
            on_stage("sampling")
        if on_step is not None and "callback_on_step_end" in self.model.options:
            arguments["callback_on_step_end"] = _told(on_step)
        generator = torch.Generator().manual_seed(request.seed)
        self._refresh_schedulers()
        try:
            with seeded(request.seed):
                output = self.pipeline(**arguments, generator=generator, output_type="pt", return_dict=False)[0]
        except ValueError as error:  # sizes it has no use for, say; before anything is sent
            raise self.model.refusal(request, error) from error
        clip = output[0] if output[0].ndim == 4 else output[:1]
        return clip.float() * 2 - 1

    def _refresh_schedulers(self) -> None:
        """Reset every scheduler to its state after loading.

        Some keep state from one clip to the next: the noise of an earlier clip (CosineDPMSolverMultistep), or a setting
        for an odd number of steps (DPMSolverSinglestep).
        """
        for scheduler, state in self.fresh:  # in place, as parts of a pipeline may share one
            vars(scheduler).clear()
            vars(scheduler).update(copy.deepcopy(state))

    def facts(self) -> dict[str, dict[str, str]]:
        """The outcome of capture, the place of weights and the work on shards, by part, for `metrics.json`."""
        weights = {name: str(stored) for name, stored in self.parallel.weights.items()}
        parts = {name: report.summary for name, report in self.parallel.report().items()}
        return {"captured": self.parallel.captured(), "stored_weights": weights, "parts": parts}

    @staticmethod
    def done(request: Request, clip: Tensor) -> Request:
        """The request with the sizes that the pipeline chose."""
        frames, _, height, width = clip.shape
        return replace(request, frames=frames, height=height, width=width)


def _numbers(request: Request) -> dict[str, int | float | None]:
    """Options of a request that a pipeline may have; None where they are left to it."""
    names = ("frames", "height", "width", "steps", "guidance_scale")
    return {**{name: getattr(request, name) for name in names}, **vars(request.options_of(PipelineOptions))}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _told(on_step: Callable[[int], None]) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step)
        return tensors

    return callback
