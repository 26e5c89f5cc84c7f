"""Options of requests for pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from meshdiff.diffusion.request import Options
from meshdiff.errors import InputError
from meshdiff.integrations.call_options import as_text, option_flag, split_option

__all__ = ["PipelineOptions"]


@dataclass(frozen=True)
class PipelineOptions(Options):
    """Options of requests for pipelines of diffusers."""

    true_cfg_scale: float | None = None
    """The guidance scale of pipelines that have guidance beside one that is trained in (FLUX, Qwen-Image)."""
    scheduler: str | None = None
    """A scheduler of diffusers in place of the pipeline's, made of the configuration of that; with settings as
    NAME:SETTING=VALUE,SETTING=VALUE (UniPCMultistepScheduler:use_flow_sigmas=true)."""
    option: tuple[str, ...] = ()
    """NAME=VALUE: any other option of the pipeline's call, as often as needed. Values are numbers, true or false, text,
    lists (1,2 or JSON), and files by their suffix: image=cat.png, video=cat.mp4, latents=x.safetensors, audio=cat.wav;
    see docs/diffusers.md."""

    def __post_init__(self) -> None:
        names = [split_option(option)[0] for option in self.option]
        for name in names:
            if names.count(name) > 1:
                raise InputError(option_flag(name), "is given twice; several values of one option are a list: a,b")

    @property
    def more_scales(self) -> tuple[float, ...]:
        return () if self.true_cfg_scale is None else (self.true_cfg_scale,)

    @property
    def by_name(self) -> dict[str, str]:
        """The text of each option by its name."""
        return dict(split_option(option) for option in self.option)

    def updated(self, values: Mapping[str, object]) -> PipelineOptions:
        for name in values:
            if not name.isidentifier():
                raise InputError("options", f"{name!r} is no name of an option")
        texts = self.by_name | {name: as_text(value) for name, value in values.items()}
        left = [name for name in texts if values.get(name, "") is not None]
        return replace(self, option=tuple(f"{name}={texts[name]}" for name in left))
