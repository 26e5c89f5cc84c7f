"""The stages of a pipeline of diffusers, by calls of its parts, whose code and whose pipeline's stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from meshdiff.autoshard.patching import Interception

__all__ = ["Stages"]

PREPARING, READING, SAMPLING, DECODING = "preparing", "reading prompt", "sampling", "decoding"

OF_SAMPLING = ("transformer", "unet", "controlnet")
"""Beginnings of the names of parts that run in each step."""
OF_DECODING = ("vocoder",)
OF_NOTHING = ("safety_checker", "watermark")
"""Beginnings of the names of parts that only look at what has been made."""


class Stages:
    """Reports in which stage the calls of a pipeline are.

    A call of a text or image encoder, or of a VAE's `encode`, is of reading the prompt; one of a VAE's `decode` of
    decoding. Sampling begins with the first call of a transformer and lasts until something is decoded, so that the
    scheduler is part of it. The rest is preparing.

    Args:
        pipeline: a `DiffusionPipeline`; its parts are intercepted from now on, outside of what puts them on a mesh.

    Attributes:
        has_sampled: True if a transformer was called in the last `reporting`.
    """

    def __init__(self, pipeline: Any) -> None:
        self._report: Callable[[str], None] | None = None
        self._between = self._stage = PREPARING
        self.has_sampled = False
        seen: set[int] = set()
        for name, part in pipeline.components.items():
            if not isinstance(part, nn.Module) or id(part) in seen or name.startswith(OF_NOTHING):
                continue
            seen.add(id(part))
            if name.startswith(OF_SAMPLING):
                Interception(part, self._around_step, owner=self)
            elif name.startswith(OF_DECODING):
                Interception(part, functools.partial(self._around, DECODING), owner=self)
            elif hasattr(part, "encode") and hasattr(part, "decode"):
                self._wrap(part, "encode", READING)
                self._wrap(part, "decode", DECODING)
            else:
                # Some pipelines call the model inside of a text encoder.
                for module in (part, *part.children()):
                    Interception(module, functools.partial(self._around, READING), owner=self)

    @contextmanager
    def reporting(self, report: Callable[[str], None] | None) -> Iterator[None]:
        """Call `report` with the name of each stage that begins in the body."""
        self._report, self._between, self.has_sampled = report, PREPARING, False
        self._begin(PREPARING, anew=True)
        try:
            yield
        finally:
            self._begin(PREPARING)
            self._report = None

    def _begin(self, stage: str, anew: bool = False) -> None:
        if stage != self._stage or anew:
            self._stage = stage
            if self._report is not None:
                self._report(stage)

    @contextmanager
    def _during(self, stage: str) -> Iterator[None]:
        before = self._stage
        self._begin(stage)
        try:
            yield
        finally:
            # After the outermost call comes what is between calls; a part that another one calls gives back to it.
            self._begin(before if before in (READING, DECODING) else self._between)

    def _around_step(self, inner: Any, args: Any, kwargs: Any) -> Any:
        self.has_sampled, self._between = True, SAMPLING
        self._begin(SAMPLING)
        return inner(*args, **kwargs)

    def _around(self, stage: str, inner: Any, args: Any, kwargs: Any) -> Any:
        if stage == DECODING:
            self._between = PREPARING
        with self._during(stage):
            return inner(*args, **kwargs)

    def _wrap(self, part: nn.Module, name: str, stage: str) -> None:
        method = getattr(part, name)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self._around(stage, method, args, kwargs)

        setattr(part, name, wrapped)
