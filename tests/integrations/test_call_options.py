"""Options of a pipeline's call: their types, their names, and the scheduler."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image

from meshdiff import InputError
from meshdiff.integrations.call_options import CallOptions
from meshdiff.integrations.early_check import early_refusal
from meshdiff.integrations.pipeline_options import PipelineOptions
from meshdiff.integrations.pipeline_outputs import frame_rate
from meshdiff.integrations.scheduler_flag import make_scheduler

Picture = Image.Image


class Mode(enum.Enum):
    FIRST = "first frame"
    LAST = "last frame"


@dataclass
class Condition:
    image: Picture
    frame_index: int = 0


class Everything:
    """A call with a parameter of every kind."""

    def __call__(
        self,
        prompt: str | list[str] = None,  # noqa: RUF013 (as diffusers writes it)
        prompt_2: str | list[str] | None = None,
        strength: float = 0.6,
        clip_skip: int = None,  # noqa: RUF013
        clean: bool = False,
        sigmas: list[float] | None = None,
        size: tuple[int, int] | None = None,
        scales: float | list[float] = 1.0,
        kwargs: dict[str, Any] | None = None,
        kind: Literal["video", "image"] = "video",
        mode: Mode = Mode.FIRST,
        image: Picture | np.ndarray | torch.Tensor | list[Picture] = None,
        last_image: torch.FloatTensor | None = None,
        reference_images: list[Picture] | None = None,
        conditions: Condition | list[Condition] = None,
        pose: np.ndarray | None = None,
        source_audio: torch.Tensor | None = None,
        file_name: str = "x",
        plain=3,
        unknown=None,
        **more: Any,
    ) -> None: ...


def read(name: str) -> Any:
    return [f"frame of {name}"] * 2 if name.endswith(".mp4") else f"contents of {name}"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("strength", "0.5", 0.5),
        ("strength", "1", 1.0),
        ("clip_skip", "2", 2),
        ("clip_skip", "none", None),
        ("clean", "true", True),
        ("clean", "False", False),
        ("sigmas", "1,0.5", [1.0, 0.5]),
        ("sigmas", "[1, 0.5]", [1.0, 0.5]),
        ("size", "(4, 6)", (4, 6)),
        ("scales", "0.5,2", [0.5, 2.0]),
        ("scales", "2", 2.0),
        ("prompt_2", "a cat, a dog", "a cat, a dog"),
        ("prompt_2", "7", "7"),
        ("prompt_2", "true", "true"),
        ("prompt_2", '["a", "b"]', ["a", "b"]),
        ("prompt_2", "a cat.png", "a cat.png"),  # which is no file, as no file is taken
        ("file_name", "cat.png", "cat.png"),
        ("kwargs", '{"scale": 0.5}', {"scale": 0.5}),
        ("kind", "image", "image"),
        ("mode", "last", Mode.LAST),
        ("mode", "last frame", Mode.LAST),
        ("image", "cat.png", "contents of cat.png"),
        ("image", "a.png,b.png", ["contents of a.png", "contents of b.png"]),
        ("image", "cat.mp4", ["frame of cat.mp4"] * 2),
        ("image", "x.safetensors#y", "contents of x.safetensors#y"),
        ("last_image", "cat.JPG", "contents of cat.JPG"),
        ("reference_images", "a.png", ["contents of a.png"]),
        ("reference_images", "a.png, b.png", ["contents of a.png", "contents of b.png"]),
        ("conditions", '[{"image": "a.png", "frame_index": 3}]', [Condition("contents of a.png", 3)]),
        ("conditions", '{"image": "a.png"}', Condition("contents of a.png")),
        ("source_audio", "a.wav", "contents of a.wav"),
        ("plain", "4", 4),
        ("unknown", "4", 4),
        ("unknown", "text", "text"),
        ("unknown", "a.png", "contents of a.png"),
    ],
)
def test_values_are_of_the_types_in_the_signature(name, text, value):
    found = CallOptions(Everything).value(name, text, read)
    assert found == value
    assert type(found) is type(value)


def test_numbers_become_tensors_and_arrays_where_only_those_are_taken():
    options = CallOptions(Everything)
    assert torch.equal(options.value("last_image", "[[1.0, 2.0]]", read), torch.tensor([[1.0, 2.0]]))
    assert np.array_equal(options.value("pose", "1,2", read), np.array([1, 2], np.float32))


def test_audio_has_a_batch_dim_where_the_pipeline_takes_one():
    wave = torch.zeros(2, 5)
    assert CallOptions(Everything).value("source_audio", "a.wav", lambda name: wave).shape == (1, 2, 5)
    assert CallOptions(diffusers.AceStepPipeline).value("src_audio", "a.wav", lambda name: wave).shape == (2, 5)


FILE = r"a file \(\.png .*\)"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("strength", "x", "'x' given, needs a number$"),
        ("strength", "true", "'true' given, needs a number$"),
        ("strength", "", "'' given, needs a number$"),
        ("clip_skip", "2.5", "'2.5' given, needs a whole number$"),
        ("clean", "1", "'1' given, needs true or false$"),
        ("sigmas", "1,x", "'1,x' given, needs a list of such: a number$"),
        ("kwargs", "3", "'3' given, needs a JSON object$"),
        ("kind", "audio", "'audio' given, needs one of video, image$"),
        ("mode", "middle", "'middle' given, needs one of first frame, last frame$"),
        ("image", "cat", f"'cat' given, needs {FILE}$"),
        ("image", "cat.tiff", f"'cat.tiff' given, needs {FILE}$"),
        ("image", "cat.wav", "image is images, a file that is no audio, or tensors$"),
        ("source_audio", "cat.png", "source_audio is audio, a .wav file, or tensors$"),
        ("conditions", '{"picture": "a.png"}', ".* needs a JSON object with image, frame_index or a list"),
    ],
)
def test_a_value_of_another_type_is_one_line(name, text, problem):
    with pytest.raises(InputError, match=rf"^--option {name}(=\S+)?: {problem}") as raised:
        CallOptions(Everything).value(name, text, read)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("pipeline", "name", "problem"),
    [
        ("WanPipeline", "height", "has a flag of its own; use --height$"),
        ("WanPipeline", "num_frames", "has a flag of its own; use --frames$"),
        ("SanaVideoPipeline", "frames", "has a flag of its own; use --frames$"),
        ("WanPipeline", "num_inference_steps", "has a flag of its own; use --steps$"),
        ("WanPipeline", "generator", "has a flag of its own; use --seed$"),
        ("WanPipeline", "steps", "is a flag of its own; use --steps$"),
        ("WanPipeline", "scheduler", "is a flag of its own; use --scheduler$"),
        ("FluxPipeline", "true_cfg_scale", "has a flag of its own; use --true-cfg-scale$"),
        ("WanPipeline", "output_type", "is set by the program itself; leave it out$"),
        ("WanPipeline", "callback_on_step_end", "is set by the program itself; leave it out$"),
        ("WanVideoToVideoPipeline", "strengths", "is no option of a WanVideoToVideoPipeline; the nearest are strength"),
        ("WanPipeline", "zzz", "is no option of a WanPipeline; it takes guidance_scale_2, num_videos_per_prompt, "),
    ],
)
def test_names_that_are_not_options_say_what_to_use(pipeline, name, problem):
    with pytest.raises(InputError, match=f"^--option {name}: {problem}"):
        CallOptions(getattr(diffusers, pipeline)).check_names([name])


@pytest.mark.parametrize(
    ("pipeline", "given", "needed"),
    [
        ("WanImageToVideoPipeline", [], "image"),
        ("WanImageToVideoPipeline", ["last_image"], "image"),
        ("WanVideoToVideoPipeline", [], "video"),
        ("CosmosVideoToWorldPipeline", [], "image or video"),
        ("FluxInpaintPipeline", [], "image"),
        ("FluxInpaintPipeline", ["image"], "mask_image"),
        ("FluxControlPipeline", [], "control_image"),
        ("WanAnimatePipeline", ["image"], "pose_video"),
        ("QwenImageImg2ImgPipeline", [], "image"),
        ("WanVideoToVideoPipeline", ["latents"], None),
        ("WanImageToVideoPipeline", ["image"], None),
        ("CosmosVideoToWorldPipeline", ["video"], None),
        ("WanPipeline", [], None),
        ("WanVACEPipeline", [], None),
        ("Flux2Pipeline", [], None),
        ("LTXConditionPipeline", [], None),
        ("OmniGenPipeline", [], None),
        ("AnyFlowPipeline", [], None),
    ],
)
def test_pipelines_name_the_input_that_they_need(pipeline, given, needed):
    options = CallOptions(getattr(diffusers, pipeline))
    options.check_names(given)
    if needed is None:
        options.check_needed(given)
        return
    with pytest.raises(InputError, match=f"^--option: a {pipeline} needs {needed}; give it with --option .*=FILE"):
        options.check_needed(given)


@pytest.mark.parametrize(
    "pipeline",
    [
        "AceStepPipeline",
        "AnimateDiffVideoToVideoPipeline",
        "Cosmos3OmniPipeline",
        "EasyAnimateControlPipeline",
        "Flux2Pipeline",
        "HunyuanImageRefinerPipeline",
        "LTX2ConditionPipeline",
        "LTXI2VLongMultiPromptPipeline",
        "QwenImageLayeredPipeline",
        "SanaWMPipeline",
        "StableAudioPipeline",
        "WanAnimatePipeline",
        "WanVACEPipeline",
    ],
)
def test_every_annotation_of_diffusers_is_understood(pipeline):
    options = CallOptions(getattr(diffusers, pipeline))
    for name in options.names:
        for text in ("none", "2", "[0.5, 1]", "text", "a.png", "a.wav", "a.pt", "{}"):
            error = refusal(options, name, text)
            assert re.match(rf"--option {name}(=\S+)?: |$", error)
            assert "a value of Python" not in error or name in OF_PYTHON, name


def refusal(options: CallOptions, name: str, text: str) -> str:
    """The error for a value; "" if it is taken."""
    try:
        options.value(name, text, read)
    except InputError as error:
        return str(error)
    return ""


OF_PYTHON = ("sampling_type",)
"""Options that only a program can give."""


def test_frame_rates_are_those_of_the_pipelines():
    assert frame_rate(CallOptions(diffusers.LTX2Pipeline), {}) == 24.0
    assert frame_rate(CallOptions(diffusers.LTX2Pipeline), {"frame_rate": 12.5}) == 12.5
    assert frame_rate(CallOptions(diffusers.CogVideoXPipeline), {}) == 8.0  # of the example in its documentation
    assert frame_rate(CallOptions(diffusers.MochiPipeline), {}) == 16.0


def test_options_are_merged_by_name():
    options = PipelineOptions(option=("image=a.png", "strength=0.5"))
    assert options.updated({"strength": 0.25, "sigmas": [1, 0.5]}).option == (
        "image=a.png",
        "strength=0.25",
        "sigmas=[1, 0.5]",
    )
    assert options.updated({"image": None}).option == ("strength=0.5",)
    with pytest.raises(
        InputError, match=r"--option image: is given twice; several values of one option are a list: a,b$"
    ):
        PipelineOptions(option=("image=a.png", "image=b.png"))
    with pytest.raises(
        InputError, match=r"--option image: has no value; write NAME=VALUE, as in --option strength=0.6$"
    ):
        PipelineOptions(option=("image",))
    with pytest.raises(InputError, match=r"options: 'a=b' is no name of an option$"):
        options.updated({"a=b": 1})


def test_a_scheduler_has_the_settings_of_the_pipelines_and_those_that_are_given():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500, "shift": 3.0}
    made = make_scheduler("UniPCMultistepScheduler:use_flow_sigmas=true,solver_order=3,flow_shift=2", config)
    assert isinstance(made, UniPCMultistepScheduler)
    assert (made.config.num_train_timesteps, made.config.use_flow_sigmas) == (500, True)
    assert (made.config.solver_order, made.config.flow_shift) == (3, 2.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("UniPC", "UniPC is no scheduler of diffusers .*; the nearest are UniPCMultistepScheduler"),
        ("WanPipeline", "WanPipeline is no scheduler of diffusers .*; the nearest are "),
        ("UniPCMultistepScheduler:use_flow_sigma=true", ".* is no setting of .*; the nearest are use_flow_sigmas, "),
        ("UniPCMultistepScheduler:solver_order", ".* is no setting of .*, as NAME=VALUE; the nearest are solver_order"),
        ("UniPCMultistepScheduler:solver_order=x", "solver_order is 'x', needs a whole number$"),
        (
            "FlowMatchEulerDiscreteScheduler:use_karras_sigmas=true,use_beta_sigmas=true",
            "cannot be made .*; give other",
        ),
    ],
)
def test_a_scheduler_that_cannot_be_made_is_one_line(text, problem):
    with pytest.raises(InputError, match=f"^--scheduler {text}: {problem}"):
        make_scheduler(text, {})


@pytest.mark.parametrize(
    ("pipeline", "arguments", "message"),
    [
        ("Flux2KleinInpaintPipeline", {}, "`image` has to be provided for inpainting"),
        ("SanaWMPipeline", {}, None),  # what it misses is no image
        ("WanPipeline", {"height": 50}, "have to be divisible by 16"),
        ("WanImageToVideoPipeline", {"image": [1]}, "`image` has to be of type"),
        ("WanPipeline", {"height": 48}, None),
        ("WanPipeline", {}, None),
        ("Cosmos3OmniPipeline", {}, None),  # its call fills in the frames that its check would miss
        ("FluxPipeline", {}, None),
        ("DDPMPipeline", {}, None),
    ],
)
def test_the_pipelines_own_check_is_asked_before_anything_is_loaded(pipeline, arguments, message):
    kind = getattr(diffusers, pipeline)
    error = early_refusal(kind, CallOptions(kind), {"prompt": "a cat", **arguments})
    assert (error is None) == (message is None)
    assert message is None or message in str(error)
