"""What a pipeline of diffusers returns, as `Outputs`: frames or images, audio, and how fast they play."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshdiff.diffusion.outputs import Outputs
from meshdiff.errors import InputError
from meshdiff.integrations.call_options import CallOptions

__all__ = ["frame_rate", "outputs_of", "sampling_rate"]

VIDEOS = ("frames", "videos", "video")
IMAGES = ("images", "image")
AUDIO = ("audios", "audio", "sound")
"""Fields of the pipelines' outputs."""

RATE_OPTIONS = ("fps", "frame_rate", "target_fps")
FPS = 16
"""Frames per second of pipelines that say nothing about it."""

VOICES = ("vocoder", "vae", "audio_vae", "sound_tokenizer")
EARS = ("vae", "audio_vae", "sound_tokenizer")
"""Parts of pipelines whose configurations have the sampling rate of the audio that they return and take."""
SAMPLING_RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")


def frame_rate(options: CallOptions, given: Mapping[str, Any]) -> float:
    """Frames per second of what a call returns.

    That is the option which says so, given or by default; else that of the example in the documentation of the call;
    else `FPS`.
    """
    for name in RATE_OPTIONS:
        rate = given.get(name, options.defaults.get(name))
        if isinstance(rate, (int, float)) and rate > 0:
            return float(rate)
    exported = re.search(r"export_to_video\([^)]*fps=(\d+)", options.documentation)
    return float(exported[1]) if exported else float(FPS)


def sampling_rate(folder: Path, parts: Sequence[str]) -> int | None:
    """Samples per second, by the configuration of the first of these parts that has it; None if none has."""
    for part in parts:
        try:
            config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for name in SAMPLING_RATES:
            if isinstance(config, dict) and isinstance(config.get(name), int):
                return int(config[name])
    return None


def outputs_of(returned: Any, kind: str, fps: float, rate: int | None) -> Outputs:
    """What a pipeline returned for `output_type="pt"`.

    Args:
        returned: its output, or a tuple that begins with the images or the frames.
        kind: the name of its class, for errors.
        fps: frames per second, if it returns frames.
        rate: samples per second, if it returns audio.

    Raises:
        InputError: if there are neither frames nor images nor audio, or audio of an unknown rate.
    """
    if isinstance(returned, Mapping):
        fields = dict(returned)
    else:
        fields = {"frames" if _each_item(returned[0])[0].ndim == 4 else "images": returned[0]}
    seen = {name: fields[name] for name in (*VIDEOS, *IMAGES) if fields.get(name) is not None}
    heard = [fields[name] for name in AUDIO if fields.get(name) is not None]
    videos: list[Tensor] = []
    for clip in _each(next(iter(seen.values()), [])):
        # Layers of one image are images of their own.
        videos += [clip] if not _are_images(seen) else list(clip[:, None])
    audio = [_waveform(one) for one in heard[0]] if heard else []
    if not videos and not audio:
        raise InputError("--checkpoint", f"a {kind} returns neither images nor frames nor audio; name another pipeline")
    if audio and rate is None:
        raise InputError("--checkpoint", f"a {kind} returns audio, and no config.json of it has the sampling rate")
    return Outputs(videos, fps, _are_images(seen), audio, rate if audio else None)


def _are_images(seen: Mapping[str, Any]) -> bool:
    return bool(seen) and next(iter(seen)) in IMAGES


def _each_item(batch: Any) -> list[Tensor]:
    return [torch.stack(list(item)) if isinstance(item, (list, tuple)) else torch.as_tensor(item) for item in batch]


def _each(batch: Any) -> Iterator[Tensor]:
    """Each clip of a batch, `[frames, channels, height, width]` in [-1, 1], of values in [0, 1]."""
    for item in _each_item(batch):
        yield (item if item.ndim == 4 else item[None]).float() * 2 - 1


def _waveform(audio: Any) -> Tensor:
    """A waveform `[channels, samples]`."""
    samples = torch.as_tensor(audio).float()
    return samples if samples.ndim == 2 else samples.reshape(1, -1)
