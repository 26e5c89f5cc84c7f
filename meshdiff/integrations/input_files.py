"""Inputs of pipelines that are files: images, videos, tensors and audio, by the suffix of their names."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import wave
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from meshdiff.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = ["SUFFIXES", "InputFiles", "is_audio", "is_file_name", "is_tensor"]

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".gif", ".mov", ".webm")
TENSORS = (".safetensors", ".pt")
AUDIO = (".wav",)
SUFFIXES = (*IMAGES, *VIDEOS, *TENSORS, *AUDIO)
"""Suffixes of the files that an option may name."""


def is_file_name(text: str) -> bool:
    """True if a text ends like the name of a file that an option may name."""
    return _suffix(text) in SUFFIXES


def is_audio(name: str) -> bool:
    """True if a file is audio."""
    return _suffix(name) in AUDIO


def is_tensor(name: str) -> bool:
    """True if a file holds tensors, which may be of anything."""
    return _suffix(name) in TENSORS


def _suffix(text: str) -> str:
    suffix = PurePath(text.partition("#")[0]).suffix.lower()
    return suffix if suffix in TENSORS else PurePath(text).suffix.lower()


class InputFiles:
    """Files that a pipeline is given, and what was in them when they were first read.

    They are read again for each request, so that a list of requests does not hold all of them.
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def read(self, name: str, flag: str, rate: int | None = None) -> tuple[Any, str]:
        """The contents of a file: an image, a list of images, a tensor, or audio as a tensor; and its SHA-256.

        Args:
            name: its name, relative to the working directory; of tensors also `FILE#NAME`, one of several in a file.
            flag: the option that names it, for errors.
            rate: samples a second that audio has to have; None if that is not known.

        Returns:
            A PIL image (RGB); a list of them; a tensor as it was stored; float32 `[channels, samples]` in [-1, 1].

        Raises:
            InputError: if it cannot be read, or is another one than when it was read first.
        """
        path, _, member = name.partition("#") if is_tensor(name) else (name, "", "")
        try:
            data = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(flag, f"{path} cannot be read ({reason}); name a file that every rank can read") from error
        digest = hashlib.sha256(data).hexdigest()
        if self._digests.setdefault(path, digest) != digest:
            raise InputError(flag, f"{path} has changed since this run began; leave it as it is until the run ends")
        try:
            with warnings.catch_warnings():
                # Pillow only warns of an image that is suspiciously large.
                warnings.filterwarnings("error", ".*decompression bomb.*")
                if is_tensor(path):
                    return _tensor(data, path, member, flag), digest
                if is_audio(path):
                    return _audio(data, path, flag, rate), digest
                return READERS[_suffix(path)](data, path), digest
        except (InputError, MemoryError):
            raise
        except Exception as error:  # of whichever library reads it
            # Without objects' addresses, which differ by rank, and without the data, which may be long.
            words = re.sub(r"<[^<>]* at 0x\w+>", "it", str(error).replace(repr(data), "it"))
            reason = " ".join(words.split())[:200] or type(error).__name__
            raise InputError(
                flag, f"{path} cannot be read ({reason}); it is damaged, or no {_suffix(path)} file"
            ) from error


def _image(data: bytes, path: str) -> Picture:
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def _video(data: bytes, path: str) -> list[Picture]:
    import imageio.v2 as imageio
    from PIL import Image

    with imageio.get_reader(data, format=_suffix(path)) as opened:
        reader: Any = opened  # which imageio's annotations do not let one iterate
        frames = [Image.fromarray(np.asarray(frame)).convert("RGB") for frame in reader]
    if not frames:
        raise ValueError("it has no frame")
    return frames


READERS: dict[str, Callable[[bytes, str], Any]] = dict.fromkeys(IMAGES, _image) | dict.fromkeys(VIDEOS, _video)


def _tensor(data: bytes, path: str, member: str, flag: str) -> Any:
    if _suffix(path) == ".safetensors":
        stored: Any = load_safetensors(data)
    else:
        stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(stored, dict):
        return stored
    tensors = {str(name): value for name, value in stored.items() if isinstance(value, Tensor)}
    if not member and len(tensors) == 1:
        return next(iter(tensors.values()))
    if member not in tensors:
        names = ", ".join(sorted(tensors)[:10]) or "none"
        raise InputError(flag, f"{path} holds several tensors; name one of them as {path}#NAME: {names}")
    return tensors[member]


def _audio(data: bytes, path: str, flag: str, rate: int | None) -> Tensor:
    with wave.open(io.BytesIO(data), "rb") as file:
        found, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
        samples = file.readframes(file.getnframes())
    if rate is not None and found != rate:
        raise InputError(
            flag,
            f"{path} has {found} samples a second and the pipeline takes {rate}; convert it: "
            f"ffmpeg -i {path} -ar {rate} converted.wav",
        )
    return torch.from_numpy(_amplitudes(samples, width).reshape(-1, channels).T.copy())


def _amplitudes(samples: bytes, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Samples of a WAV file, of `width` bytes each, as float32 in [-1, 1]."""
    if width == 1:  # the only size without a sign
        return (np.frombuffer(samples, np.uint8).astype(np.float32) - 128) / 128
    # The bytes of each sample become the upper ones of 32 bits, which keeps its sign.
    padded = np.zeros((len(samples) // width, 4), np.uint8)
    padded[:, 4 - width :] = np.frombuffer(samples, np.uint8).reshape(-1, width)
    return (padded.view("<i4")[:, 0] / 2**31).astype(np.float32)
