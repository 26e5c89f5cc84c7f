"""Requests: the options of one generation, independent of the mesh it runs on."""

from __future__ import annotations

import dataclasses
import math
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from meshdiff.errors import InputError

__all__ = ["Options", "Request"]


MOST_STEPS = 100_000

OptionsT = TypeVar("OptionsT", bound="Options")


@dataclass(frozen=True)
class Options:
    """Options of a request that one model has and others have not; this one has none."""

    @property
    def more_scales(self) -> tuple[float, ...]:
        """Guidance scales beside `Request.guidance_scale`."""
        return ()

    def updated(self, values: Mapping[str, object]) -> Options:
        """These options with further ones, by the names that only the model knows; None takes one away.

        Raises:
            InputError: if the model takes none.
        """
        raise InputError("options", "is for pipelines of diffusers, whose own options it names; leave it out")


@dataclass(frozen=True)
class Request:
    """One clip to generate. A field that is None is chosen by the model: its `prepare` fills it in.

    Raises:
        InputError: if a value cannot be that of any model.
    """

    prompt: str
    """What the clip shows. digits: a digit or its name, a direction, and if you like a speed (slowly, steadily,
    quickly)."""
    negative_prompt: str = ""
    """What guidance leads away from; empty for "anything"."""
    frames: int | None = None
    """Frames of the clip. wan: 4 n + 1 of them."""
    height: int | None = None
    """Height in pixels. wan: a multiple of 16."""
    width: int | None = None
    """Width in pixels. wan: a multiple of 16."""
    steps: int | None = None
    """Sampling steps: model evaluations for each guidance branch."""
    guidance_scale: float | None = None
    """How strongly to follow the prompt; 1 turns guidance off and halves the work."""
    seed: int = 0
    """Seed of the initial noise, and of what a scheduler of diffusers draws; the same seed gives the same clip on every
    layout."""
    solver: str | None = None
    """Integrator of the flow: first order (euler), second order at the same cost (ab2). wan: also diffusers' UniPC,
    which Wan ships (unipc). diffusers: the scheduler of the pipeline, not to be given."""
    shift: float | None = None
    """Time shift: above 1, more of the steps are spent on the noisy part. wan: by default 3 up to 480p and 5 above.
    diffusers: the scheduler's own, not to be given."""
    options: Options = field(default_factory=Options)
    """Options that one model has and others have not."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("--prompt", 'is empty; try --prompt "a 7 moving left"')
        for name in ("prompt", "negative_prompt"):
            broken = [c for c in getattr(self, name) if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"]
            if broken:
                flag = f"--{name.replace('_', '-')}"
                if "\udc80" <= broken[0] <= "\udcff":  # how Python reads a byte that it cannot decode
                    raise InputError(
                        flag,
                        f"is not in this locale's encoding ({sys.getfilesystemencoding()}); PYTHONUTF8=1 in the "
                        "environment reads UTF-8",
                    )
                raise InputError(flag, f"holds {broken[0]!r}, which is a control character or half of one")
        if (self.steps or 0) > MOST_STEPS:
            raise InputError("--steps", f"{self.steps} given, needs {MOST_STEPS} at most")
        for name in ("frames", "height", "width", "steps"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise InputError(f"--{name}", f"{size} given, needs at least 1")
        for scale in self.guidance_scales:
            if not math.isfinite(scale):
                raise InputError("--guidance-scale", f"{scale} given, needs a finite number")
        if self.shift is not None and not (math.isfinite(self.shift) and self.shift > 0):
            raise InputError("--shift", f"{self.shift} given, needs a number above 0")
        if not 0 <= self.seed < 2**63:
            raise InputError("--seed", f"{self.seed} given, needs to be from 0 to 2**63 - 1")

    def filled(self, defaults: Request) -> Request:
        """This request with the values of `defaults` where it has None."""
        left_open = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is None]
        return dataclasses.replace(self, **{name: getattr(defaults, name) for name in left_open})

    def options_of(self, kind: type[OptionsT]) -> OptionsT:
        """The options, of a model whose options are of that class; their defaults if none were given.

        Raises:
            TypeError: if they are those of another model.
        """
        if isinstance(self.options, kind):
            return self.options
        if type(self.options) is not Options:
            raise TypeError(f"this model takes {kind.__name__}, not {type(self.options).__name__}")
        return kind()

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a request that leaves none of them open."""
        assert self.frames is not None
        assert self.height is not None
        assert self.width is not None
        return self.frames, self.height, self.width

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The scales that are given: one for each of the model's experts, or one for all."""
        first = () if self.guidance_scale is None else (self.guidance_scale,)
        return first + self.options.more_scales

    @property
    def branches(self) -> list[str]:
        """The prompt of every guidance branch; just the one when guidance is off."""
        return [self.prompt] if set(self.guidance_scales) == {1} else [self.prompt, self.negative_prompt]
