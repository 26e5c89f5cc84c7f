"""Files as inputs of pipelines: what is read, and what cannot be."""

from __future__ import annotations

import hashlib
import wave
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from meshdiff import InputError
from meshdiff.integrations.input_files import InputFiles

RAMP = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)


def write_wav(path: Path, samples: bytes, width: int, channels: int = 1, rate: int = 100) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(RAMP).save("image.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # by a quarter, as a camera that is held upright says
    Image.fromarray(RAMP[:, :, 0]).save("grey.jpg", exif=rotated)
    frames = [np.full((32, 48, 3), 40 * number, np.uint8) for number in range(5)]
    imageio.mimwrite("video.mp4", frames, fps=8)
    imageio.mimwrite("video.gif", frames, duration=100)
    save_file({"a": torch.arange(3.0)}, "one.safetensors")
    save_file({"a": torch.arange(3.0), "b": torch.ones(2)}, "two.safetensors")
    torch.save(torch.ones(2, 3), "tensor.pt")
    torch.save({"x": torch.zeros(4)}, "named.pt")
    torch.save(Path, "class.pt")
    save_file({"a": torch.arange(3.0)}, "not-an-image.png")
    Path("cut.png").write_bytes(Path("image.png").read_bytes()[:200])
    Path("cut.mp4").write_bytes(Path("video.mp4").read_bytes()[:100])
    Path("empty.safetensors").write_bytes(b"")
    return tmp_path


def read(name: str, rate: int | None = None):
    return InputFiles().read(name, f"--option x={name}", rate)[0]


def test_images_are_rgb_and_upright(folder):
    assert np.array_equal(np.asarray(read("image.png")), RAMP)
    grey = read("grey.jpg")
    assert (grey.mode, grey.size) == ("RGB", (32, 48))


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
def test_videos_are_lists_of_frames(name, folder):
    frames = read(name)
    assert [frame.size for frame in frames] == [(48, 32)] * 5
    assert [frame.mode for frame in frames] == ["RGB"] * 5
    assert np.allclose([np.asarray(frame).mean() for frame in frames], [0, 40, 80, 120, 160], atol=3)


def test_tensors_are_read_by_name_where_there_are_several(folder):
    assert torch.equal(read("one.safetensors"), torch.arange(3.0))
    assert torch.equal(read("two.safetensors#b"), torch.ones(2))
    assert torch.equal(read("tensor.pt"), torch.ones(2, 3))
    assert torch.equal(read("named.pt#x"), torch.zeros(4))


@pytest.mark.parametrize(
    ("width", "samples"),
    [
        (1, bytes([0, 128, 192])),
        (2, np.array([-(2**15), 0, 2**14], "<i2").tobytes()),
        (3, bytes([0, 0, 128, 0, 0, 0, 0, 0, 64])),
        (4, np.array([-(2**31), 0, 2**30], "<i4").tobytes()),
    ],
)
def test_audio_of_any_width_is_numbers_up_to_one(width, samples, folder):
    write_wav(Path("a.wav"), samples, width)
    assert torch.equal(read("a.wav", rate=100), torch.tensor([[-1.0, 0.0, 0.5]]))


def test_channels_of_audio_are_apart(folder):
    write_wav(Path("a.wav"), np.array([0, 2**14, 0, -(2**14)], "<i2").tobytes(), 2, channels=2)
    assert torch.equal(read("a.wav"), torch.tensor([[0.0, 0.0], [0.5, -0.5]]))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "nowhere.png",
            r"nowhere.png cannot be read \(No such file or directory\); name a file that every rank can read$",
        ),
        (".png", r".png cannot be read \(No such file"),
        ("a\0.png", "cannot be read .*; name a file that"),
        ("not-an-image.png", r"not-an-image.png cannot be read \(.*\); it is damaged, or no .png file$"),
        ("cut.png", r"cut.png cannot be read \(.*\); it is damaged, or no .png file$"),
        ("cut.mp4", r"cut.mp4 cannot be read \(.*\); it is damaged, or no .mp4 file$"),
        ("empty.safetensors", r"empty.safetensors cannot be read \(.*\); it is damaged, or no .safetensors file$"),
        ("class.pt", r"class.pt cannot be read \(.*\); it is damaged, or no .pt file$"),
        ("two.safetensors", "two.safetensors holds several tensors; name one of them as two.safetensors#NAME: a, b$"),
        ("two.safetensors#c", "two.safetensors holds several tensors; name one of them as .*: a, b$"),
        ("image.wav", r"image.wav cannot be read \(.*\); it is damaged, or no .wav file$"),
    ],
)
def test_what_cannot_be_read_is_one_line(name, problem, folder, capfd):
    Path("image.wav").write_bytes(Path("image.png").read_bytes())
    with pytest.raises(InputError, match=rf"(?s)^--option x=.*: .*{problem}") as raised:
        read(name)
    assert "\n" not in str(raised.value)
    assert " at 0x" not in str(raised.value)  # which would differ by rank
    assert len(str(raised.value)) < 500
    assert capfd.readouterr().err == ""


def test_audio_of_another_rate_says_how_to_convert_it(folder):
    write_wav(Path("a.wav"), b"\0\0", 2, rate=8000)
    with pytest.raises(
        InputError, match=r"a.wav has 8000 samples a second and .* takes 44100; .* ffmpeg -i a.wav -ar 44100"
    ):
        read("a.wav", rate=44100)


def test_a_file_that_changes_is_noticed(folder):
    files = InputFiles()
    _, digest = files.read("image.png", "--option image=image.png")
    assert digest == hashlib.sha256(Path("image.png").read_bytes()).hexdigest()
    assert files.read("image.png", "--option image=image.png")[1] == digest
    Image.fromarray(RAMP + 1).save("image.png")
    with pytest.raises(InputError, match=r"^--option image=image.png: image.png has changed since this run began"):
        files.read("image.png", "--option image=image.png")
