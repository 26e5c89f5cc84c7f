"""What one generation is asked for, independent of the mesh it runs on."""

from __future__ import annotations

import math
import sys
import unicodedata
from dataclasses import dataclass
from typing import Literal

from meshdiff.errors import InputError

__all__ = ["Request"]


MOST_STEPS = 100_000


@dataclass(frozen=True)
class Request:
    """One clip to generate; the defaults are those of the embedded model."""

    prompt: str = "a 7 moving left"
    """What the clip shows: a digit or its name, a direction, and if you like a speed
    (slowly, steadily, quickly)."""
    negative_prompt: str = ""
    """What guidance leads away from; empty for "anything"."""
    frames: int = 16
    """Frames of the clip."""
    height: int = 32
    """Height in pixels."""
    width: int = 32
    """Width in pixels."""
    steps: int = 20
    """Sampling steps: model evaluations for each guidance branch."""
    guidance_scale: float = 4.0
    """How strongly to follow the prompt; 1 turns guidance off and halves the work."""
    seed: int = 0
    """Seed of the initial noise; the same seed gives the same clip on every layout."""
    solver: Literal["euler", "ab2"] = "ab2"
    """Integrator of the flow: first order (euler) or second order at the same cost (ab2)."""
    shift: float | None = 3.0
    """Time shift: above 1, more of the steps are spent on the noisy part."""

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
            if size is not None and size < 1:  # None: a model of its own sizes chooses
                raise InputError(f"--{name}", f"{size} given, needs at least 1")
        for scale in self.guidance_scales:
            if not math.isfinite(scale):
                raise InputError("--guidance-scale", f"{scale} given, needs a finite number")
        if self.shift is not None and not (math.isfinite(self.shift) and self.shift > 0):
            raise InputError("--shift", f"{self.shift} given, needs a number above 0")
        if not 0 <= self.seed < 2**63:
            raise InputError("--seed", f"{self.seed} given, needs to be from 0 to 2**63 - 1")

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The scale for each of the model's experts, of which most models have one."""
        return (self.guidance_scale,)

    @property
    def branches(self) -> list[str]:
        """The prompt of every guidance branch; just the one when guidance is off."""
        return [self.prompt] if set(self.guidance_scales) == {1} else [self.prompt, self.negative_prompt]
