"""Options of a call of a pipeline of diffusers, each typed from the signature of its `__call__`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from types import UnionType
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image as Picture
from torch import Tensor

from meshdiff.errors import InputError
from meshdiff.integrations.input_files import SUFFIXES, is_audio, is_file_name, is_tensor

__all__ = ["CallOptions", "as_text", "convert", "from_text", "hints_of", "members_of", "option_flag", "split_option"]

FLAGS = {
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "height": "--height",
    "width": "--width",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "true_cfg_scale": "--true-cfg-scale",
    "generator": "--seed",
}
"""Parameters that flags of their own set."""

FLAGS_ALONE = ("frames", "steps", "seed", "scheduler")
"""Flags whose names are no parameters."""

FRAMES = ("num_frames", "frames", "video_length")
"""Names of the number of frames; a pipeline has one of them."""

OF_THE_PROGRAM = re.compile(r"self|output_type|return_dict|(\w+_)?callback\w*")

NEEDS = (
    (r"ImageToVideo|Image2Video|I2V|I2I|Img2Img|Inpaint", ("image",)),
    (r"Inpaint", ("mask_image",)),
    (r"VideoToVideo", ("video",)),
    (r"VideoToWorld", ("image", "video")),
    (r"Control", ("control_image",)),
    (r"Control", ("control_video",)),
)
"""Inputs that pipelines with such names need, one of each, although their signatures have None for them."""

MEDIA = (Picture, np.ndarray, Tensor)
"""Classes of the inputs that are read from files."""

A_FILE = f"a file ({' '.join(SUFFIXES)})"

OF_AUDIO = re.compile("audio|wave|sound")
"""Pattern found in the names of audio inputs."""

AUDIO_WITHOUT_BATCH = ("src_audio", "reference_audio")
"""Audio inputs that have no batch dim; those of other pipelines have one."""

Read = Callable[[str], Any]
"""Function that returns the contents of a file, given its name."""


class Unfit(Exception):
    """A value that a parameter does not take."""


class CallOptions:
    """The parameters of a pipeline's `__call__`.

    Args:
        pipeline: a class of pipelines.
    """

    def __init__(self, pipeline: type) -> None:
        call: Any = pipeline.__call__
        self.kind = pipeline.__name__
        parameters = inspect.signature(call).parameters.values()
        named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        self.defaults = {one.name: one.default for one in named}
        self.hints = hints_of(call, {one.name: one for one in named})
        self.documentation = str(call.__doc__ or "")

    def __contains__(self, name: str) -> bool:
        return name in self.defaults

    @property
    def frames(self) -> str:
        """The name of the number of frames."""
        return next((name for name in FRAMES if name in self.defaults), FRAMES[0])

    @property
    def flags(self) -> dict[str, str]:
        """Parameters that flags of their own set, with these flags."""
        return {**FLAGS, self.frames: "--frames"}

    @property
    def names(self) -> list[str]:
        """The parameters that `--option` sets."""
        return [name for name in self.defaults if name not in self.flags and not OF_THE_PROGRAM.fullmatch(name)]

    def check_names(self, names: Iterable[str]) -> None:
        """Raise `InputError` for names that `--option` does not set."""
        for name in names:
            if name in self.names:
                continue
            if name in self.flags and name in self.defaults:
                raise InputError(option_flag(name), f"has a flag of its own; use {self.flags[name]}")
            if name in self.defaults:
                raise InputError(option_flag(name), "is set by the program itself; leave it out")
            if name in FLAGS_ALONE:
                raise InputError(option_flag(name), f"is a flag of its own; use --{name}")
            near = difflib.get_close_matches(name, [*self.names, *self.flags], 3, 0.5)
            known = f"the nearest are {', '.join(near)}" if near else f"it takes {', '.join(self.names)}"
            raise InputError(option_flag(name), f"is no option of a {self.kind}; {known}")

    def check_needed(self, names: Iterable[str]) -> None:
        """Raise `InputError` if an input that the pipeline cannot do without is not among these names."""
        given = set(names)
        without_default = [name for name in self.names if self.defaults[name] is inspect.Parameter.empty]
        for name in without_default:
            if name not in given:
                raise self._needs((name,))
        for pattern, inputs in NEEDS:
            known = [name for name in inputs if name in self.defaults]
            others = ["latents", *(f"{name}_{end}" for name in known for end in ("latents", "embeds"))]
            if known and re.search(pattern, self.kind) and not given.intersection([*known, *others]):
                raise self._needs(known)

    def _needs(self, names: Sequence[str]) -> InputError:
        examples = " or ".join(
            f"--option {name}={'FILE' if takes_files(self.hints[name]) else 'VALUE'}" for name in names
        )
        return InputError("--option", f"a {self.kind} needs {' or '.join(names)}; give it with {examples}")

    def value(self, name: str, text: str, read: Read) -> Any:
        """The value of a parameter, read from text.

        Args:
            name: of a parameter among `names`.
            text: the value: a number, a file, JSON, or plain text, as the parameter's annotation asks for it.
            read: function that returns the contents of a file.

        Raises:
            InputError: if the text is no such value.
        """
        hint = self.hints[name]

        def read_fitting(file: str) -> Any:
            if not is_tensor(file) and is_audio(file) != bool(OF_AUDIO.search(name)):
                wanted = "audio, a .wav file" if OF_AUDIO.search(name) else "images, a file that is no audio"
                raise InputError(option_flag(name, text), f"{name} is {wanted}, or tensors")
            return read(file)

        try:
            value = from_text(text, hint, read_fitting)
        except Unfit:
            problem = f"{text!r} given, needs {described(hint)}"
            raise InputError(option_flag(name), problem) from None
        if is_audio(text) and isinstance(value, Tensor) and name not in AUDIO_WITHOUT_BATCH:
            return value[None]
        return value


def option_flag(name: str, text: str | None = None) -> str:
    """An option as it is typed, for messages."""
    return f"--option {name}" if text is None else f"--option {name}={text}"


def split_option(option: str) -> tuple[str, str]:
    """The name and the value of `NAME=VALUE`.

    Raises:
        InputError: if it is not of that form.
    """
    name, sign, text = option.partition("=")
    if not sign or not name.strip():
        raise InputError(f"--option {option}", "has no value; write NAME=VALUE, as in --option strength=0.6")
    return name.strip().replace("-", "_"), text


def as_text(value: object) -> str:
    """A value from JSON as the text that `CallOptions.value` reads."""
    return value if isinstance(value, str) else json.dumps(value)


def hints_of(function: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The annotation of each parameter of a function; the class of its default if it has none, else Any."""
    try:
        resolved = typing.get_type_hints(function)
    except Exception:  # a name that is imported for type checkers only
        resolved = {}
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        hint = resolved.get(name, parameter.annotation)
        if hint is inspect.Parameter.empty or isinstance(hint, str):
            has_class = parameter.default is not None and parameter.default is not inspect.Parameter.empty
            hint = type(parameter.default) if has_class else Any
        try:
            found[name] = typing.Optional[hint] if parameter.default is None else hint  # noqa: UP045 (of a value)
        except TypeError:  # no class, nor what typing makes of classes
            found[name] = Any
    return found


def _arguments(hint: Any) -> tuple[Any, ...]:
    """The members of a union, else the annotation itself."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return tuple(part for member in typing.get_args(hint) for part in _arguments(member))
    return (hint,)


def members_of(hint: Any) -> set[Any]:
    """The classes in an annotation, those of the items of lists among them."""
    members = set(_arguments(hint))
    for member in _arguments(hint):
        if _is_sequence(member) and typing.get_args(member):
            members |= members_of(_items(member))
    return members


def _is_sequence(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) in (list, tuple, Sequence, Iterable)


def _is_media(hint: Any) -> bool:
    # torch.FloatTensor and its like are no subclasses of Tensor.
    return hint in MEDIA or str(getattr(hint, "__name__", "")).endswith("Tensor")


def _items(hint: Any) -> Any:
    """The annotation of the items of a list or tuple."""
    items = [item for item in typing.get_args(hint) if item is not Ellipsis]
    return typing.Union[tuple(items)] if items else Any  # noqa: UP007 (of a tuple)


def takes_files(hint: Any) -> bool:
    """True if an annotation allows the contents of a file."""
    members = _arguments(hint)
    return any(
        member is Any
        or _is_media(member)
        or (_is_sequence(member) and bool(typing.get_args(member)) and takes_files(_items(member)))
        for member in members
    )


def from_text(text: str, hint: Any, read: Read) -> Any:
    """The value that a text stands for, of a parameter with that annotation.

    Raises:
        Unfit: if it is none of those that the annotation allows.
        InputError: if it names a file that cannot be read.
    """
    for candidate in _candidates(text, hint):
        try:
            return convert(candidate, hint, read)
        except Unfit:
            continue
    raise Unfit


def _candidates(text: str, hint: Any) -> list[Any]:
    """Values that a text may stand for, the likeliest first."""
    inner = text.strip().removeprefix("(").removesuffix(")")
    parts = [part.strip() for part in inner.split(",") if part.strip()]
    found: list[Any] = []
    if takes_files(hint) and len(parts) > 1 and all(is_file_name(part) for part in parts):
        found.append(parts)
    value = _json(text)
    if not isinstance(value, str):
        found.append(value)
    found.append(text)
    if parts and "," in text:
        found.append([_json(part) for part in parts])
    return found


def _json(text: str) -> Any:
    """The value of JSON or of Python's names for true, false and null; else the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null", "none": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text


def convert(value: Any, hint: Any, read: Read) -> Any:
    """A value from JSON, in which texts may be names of files, as one that an annotation allows.

    Raises:
        Unfit: if the annotation allows no such value.
        InputError: if it names a file that cannot be read.
    """
    members = _arguments(hint)
    if isinstance(value, str) and is_file_name(value) and takes_files(hint):
        return _contents(value, members, read)
    for member in members:
        try:
            return _convert(value, member, read)
        except Unfit:
            continue
    raise Unfit


def _contents(name: str, members: Sequence[Any], read: Read) -> Any:
    """The contents of a file, in a list if only a list of such is taken."""
    contents = read(name)
    is_alone = any(member is Any or _is_media(member) for member in members)
    return contents if is_alone or isinstance(contents, list) else [contents]


def _convert(value: Any, hint: Any, read: Read) -> Any:
    """A value as one of an annotation that is no union."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is Any:
        return value
    if value is None or hint in (None, type(None)):
        if value is None and hint in (None, type(None)):
            return None
        raise Unfit
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise Unfit
    if _is_sequence(hint) and isinstance(value, list):
        items = [convert(item, _items(hint), read) for item in value]
        return tuple(items) if (typing.get_origin(hint) or hint) is tuple else items
    if hint is float and is_number:
        return float(value)
    if _is_media(hint) and hint is not Picture:
        return _numbers(value, hint)
    if isinstance(hint, type) and issubclass(hint, Enum) and isinstance(value, str):
        return _member(value, hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _instance(value, hint, read)
    kind = typing.get_origin(hint) or hint
    if kind in (str, int, bool, dict) and type(value) is kind:
        return value
    raise Unfit


def _numbers(value: Any, hint: Any) -> Any:
    """Numbers, and lists of them, as a tensor or an array."""
    if isinstance(value, (bool, str, dict)):
        raise Unfit
    try:
        return np.asarray(value, np.float32) if hint is np.ndarray else torch.tensor(value)
    except (TypeError, ValueError) as error:
        raise Unfit from error


def _member(value: str, kind: type[Enum]) -> Enum:
    for member in kind:
        if value.casefold() in (member.name.casefold(), str(member.value).casefold()):
            return member
    raise Unfit


def _instance(value: Mapping[str, Any], kind: Any, read: Read) -> Any:
    """A condition of LTX, say, from a JSON object with its fields."""
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    if value.keys() - fields:
        raise Unfit
    try:
        return kind(**{name: convert(item, hints[name], read) for name, item in value.items()})
    except TypeError as error:  # a field is missing
        raise Unfit from error


def described(hint: Any) -> str:
    """The values that an annotation allows, for a message."""
    words = dict.fromkeys(_described(member) for member in _arguments(hint) if member is not type(None))
    if A_FILE in words:
        words.pop(f"a list of such: {A_FILE}", None)
    return " or ".join(words)


def _described(hint: Any) -> str:
    if hint is Any or _is_media(hint):
        return A_FILE
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if _is_sequence(hint):
        return f"a list of such: {described(_items(hint))}" if typing.get_args(hint) else "a list"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    if dataclasses.is_dataclass(hint):
        return f"a JSON object with {', '.join(field.name for field in dataclasses.fields(hint))}"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "a JSON object" if (typing.get_origin(hint) or hint) is dict else "a value of Python")
