"""What a model makes of a request: videos or images, and audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Outputs"]


@dataclass(frozen=True)
class Outputs:
    """Everything that was made of one request.

    Attributes:
        videos: each float32 `[frames, channels, height, width]` in [-1, 1], with 1, 3 or, of images, 4 channels.
        fps: frames per second of the videos.
        are_images: the videos are images, of one frame each.
        audio: each float32 `[channels, samples]` in [-1, 1]; one for each video where there are both.
        sampling_rate: samples per second of the audio; None where there is none.
    """

    videos: Sequence[Tensor]
    fps: float
    are_images: bool = False
    audio: Sequence[Tensor] = ()
    sampling_rate: int | None = None

    @property
    def is_finite(self) -> bool:
        """True if every number is finite."""
        return all(bool(tensor.isfinite().all()) for tensor in (*self.videos, *self.audio))
