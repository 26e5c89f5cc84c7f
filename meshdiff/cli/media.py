"""Clips as files: videos and pictures to look at, and the exact numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = ["to_pixels", "write_video"]

SHORTER_SIDE = 256
"""Pixels of the shorter side below which clips are magnified, by an integer factor, for viewing."""
SHEET_FRAMES = 8


def to_pixels(video: Tensor) -> Tensor:
    """A clip `[frames, channels, height, width]` in [-1, 1] as uint8 RGB `[frames, height, width, 3]`, magnified."""
    factor = max(1, SHORTER_SIDE // min(video.shape[-2:]))
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def write_video(video: Tensor, folder: Path, fps: int = 8) -> None:
    """Write a clip into `folder`, which exists.

    `video.safetensors` holds the numbers as they are, float32 under the key
    `video`; `video.mp4` and `video.gif` play; `contact_sheet.png` shows evenly
    spaced frames side by side, in reading order.

    Args:
        video: `[frames, channels, height, width]` in [-1, 1], 1 or 3 channels.
        fps: frames per second of the files that play.
    """
    # Imported here: the library itself does not need them.
    import imageio.v2 as imageio
    from PIL import Image

    save_file({"video": video.float().cpu().contiguous()}, folder / "video.safetensors")
    pixels = to_pixels(video.cpu()).numpy()
    imageio.mimwrite(folder / "video.mp4", list(pixels), fps=fps, codec="libx264", quality=9, macro_block_size=2)
    images = [Image.fromarray(frame) for frame in pixels]
    images[0].save(folder / "video.gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    _contact_sheet(images).save(folder / "contact_sheet.png")


def _contact_sheet(images: list[Picture]) -> Picture:
    from PIL import Image

    count = min(SHEET_FRAMES, len(images))
    chosen = [images[round(i * (len(images) - 1) / max(1, count - 1))] for i in range(count)]
    columns, gap = -(-count // 2) if count > 4 else count, 4
    rows = -(-count // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (96, 96, 96))
    for i, image in enumerate(chosen):
        row, column = divmod(i, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
