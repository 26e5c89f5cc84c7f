"""Clips as files: videos and pictures to look at, and the exact numbers."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from meshdiff.diffusion.outputs import Outputs

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = ["to_pixels", "write_audio", "write_outputs", "write_video"]

SHORTER_SIDE = 256
"""Pixels of the shorter side below which clips are magnified, by an integer factor, for viewing."""
SHEET_FRAMES = 8


def to_pixels(video: Tensor) -> Tensor:
    """A clip `[frames, channels, height, width]` in [-1, 1] as uint8 RGB `[frames, height, width, 3]`, magnified."""
    factor = max(1, SHORTER_SIDE // min(video.shape[-2:]))
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    return pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()


def write_outputs(outputs: Outputs, folder: Path) -> None:
    """Write everything that was made of a request into `folder`, which exists.

    Images are `image.png`, in their own size; videos and their audio are as
    `write_video` has them; audio alone is `audio.wav`. Of several, all names but
    that of the numbers end in `-0`, `-1` and so on. The numbers as they are,
    float32, are in `video.safetensors` (keys `video`, and `audio` if there is
    any; of several `video-0` ...), of audio alone in `audio.safetensors`.
    """
    numbers: dict[str, Tensor] = {}
    for name, tensors in (("video", outputs.videos), ("audio", outputs.audio)):
        numbers |= {f"{name}{_ending(index, tensors)}": tensor for index, tensor in enumerate(tensors)}
    numbers = {name: tensor.float().cpu().contiguous() for name, tensor in numbers.items()}
    save_file(numbers, folder / ("video.safetensors" if outputs.videos else "audio.safetensors"))
    for index, waveform in enumerate(outputs.audio):
        assert outputs.sampling_rate is not None
        write_audio(waveform, folder / f"audio{_ending(index, outputs.audio)}.wav", outputs.sampling_rate)
    for index, video in enumerate(outputs.videos):
        ending = _ending(index, outputs.videos)
        if outputs.are_images:
            _picture(video[0]).save(folder / f"image{ending}.png")
        else:
            audio = folder / f"audio{ending}.wav" if index < len(outputs.audio) else None
            write_video(video, folder, outputs.fps, ending, audio)


def _ending(index: int, several: Any) -> str:
    return f"-{index}" if len(several) > 1 else ""


def write_video(video: Tensor, folder: Path, fps: float = 8, ending: str = "", audio: Path | None = None) -> None:
    """Write a clip into `folder`, which exists.

    `video.mp4` and `video.gif` play; `contact_sheet.png` shows evenly spaced
    frames side by side, in reading order.

    Args:
        video: `[frames, channels, height, width]` in [-1, 1], 1 or 3 channels.
        fps: frames per second of the files that play.
        ending: of the names of the files.
        audio: a WAV file to be played with `video.mp4`.
    """
    # Imported here: the library itself does not need them.
    import imageio.v2 as imageio
    from PIL import Image

    pixels = to_pixels(video.cpu()).numpy()
    sound = {} if audio is None else {"audio_path": str(audio), "audio_codec": "aac", "ffmpeg_log_level": "error"}
    imageio.mimwrite(
        folder / f"video{ending}.mp4", list(pixels), fps=fps, codec="libx264", quality=9, macro_block_size=2, **sound
    )
    images = [Image.fromarray(frame) for frame in pixels]
    images[0].save(
        folder / f"video{ending}.gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
    )
    _contact_sheet(images).save(folder / f"contact_sheet{ending}.png")


def write_audio(waveform: Tensor, path: Path, sampling_rate: int) -> None:
    """Write a WAV file of 16 bits.

    Args:
        waveform: `[channels, samples]` in [-1, 1]; what is beyond is clipped.
        path: the file.
        sampling_rate: samples per second.
    """
    samples = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().cpu().numpy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(samples.astype("<i2").tobytes())


def _picture(image: Tensor) -> Picture:
    """An image `[channels, height, width]` in [-1, 1], of 1, 3 or 4 channels."""
    from PIL import Image

    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())


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
