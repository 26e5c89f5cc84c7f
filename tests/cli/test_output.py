from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from meshdiff import InputError
from meshdiff.cli.media import to_pixels, write_outputs
from meshdiff.cli.output import COMPLETE, output_folder
from meshdiff.diffusion.outputs import Outputs


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "run"
    with output_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["run"]
    assert (out / "a").read_text() == "1"


def test_a_failed_run_leaves_nothing(tmp_path):
    def fail():
        with output_folder(tmp_path / "new" / "run") as folder:
            (folder / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_files_are_replaced_only_on_request(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with output_folder(out) as folder:  # an empty folder is fine
        (folder / "old").write_text("1")
    with pytest.raises(InputError, match=r"--out: .* holds files that are no run's; name another folder$"):
        output_folder(out, overwrite=True).__enter__()
    (out / COMPLETE).write_text("{}")
    with pytest.raises(InputError, match=r"--out: .* holds a run already; name another folder or add --overwrite"):
        output_folder(out).__enter__()
    with output_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_written_is_one_clear_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"--out: .* is a file; name another folder"):
        output_folder(file).__enter__()
    with pytest.raises(InputError, match=r"--out: .* cannot be written \(Not a directory\)"):
        output_folder(file / "run").__enter__()
    with pytest.raises(InputError, match=r"--out: .* cannot be written \(File name too long\)"):
        output_folder(tmp_path / ("x" * 300)).__enter__()


def test_a_clip_becomes_files_that_show_it(tmp_path):
    video = torch.full((10, 1, 32, 40), -1.0)
    for frame in range(10):
        video[frame, 0, 8:16, 4 * frame : 4 * frame + 4] = 1.0
    write_outputs(Outputs([video], fps=8), tmp_path)
    assert torch.equal(load_file(tmp_path / "video.safetensors")["video"], video)
    frames = imageio.mimread(tmp_path / "video.mp4")
    assert len(frames) == 10
    assert frames[0].shape == (256, 320, 3)
    # The bright block is where it should be, in the first frame and the last.
    for index in (0, 9):
        column = 8 * (4 * index + 2)
        assert frames[index][96, column].min() > 200
        assert frames[index][200, column].max() < 40
    gif = Image.open(tmp_path / "video.gif")
    assert gif.n_frames == 10
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.size == (4 * 324 + 4, 2 * 260 + 4)


def test_pixels_are_rgb_and_rounded():
    video = torch.tensor([-1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 2)
    pixels = to_pixels(video)
    assert pixels.shape == (1, 256, 256, 3)
    assert pixels[0, ::128, ::128, 0].tolist() == [[0, 128], [255, 255]]


def test_a_signal_while_a_folder_is_removed_leaves_nothing_behind(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def disturbed(path: Path, **options: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", disturbed)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with pytest.raises(SystemExit), output_folder(tmp_path / "run"):
            raise InputError("--out", "cannot be written")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []
