"""Pipelines that take files: every input, and everything that comes out, on one process and on two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import wave
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlPipeline,
    FluxInpaintPipeline,
    LTX2Pipeline,
    StableAudioPipeline,
    WanImageToVideoPipeline,
    WanVACEPipeline,
    WanVideoToVideoPipeline,
)
from PIL import Image
from ranks import run_on_every_rank, start_on_ranks
from safetensors.torch import load_file

from experiments.tiny_models.pipelines import PIPELINES, WITH_FILES
from experiments.tiny_models.wan_checkpoint import silence_libraries as silence
from meshdiff import CommsCounter, Layout, init_mesh
from meshdiff.cli.run import command, main, parse
from meshdiff.integrations.diffusers_model import DiffusersRun
from meshdiff.pipeline import prepare_request

IMPORTED = (  # by the process that ranks are forked from
    FluxControlPipeline,
    FluxInpaintPipeline,
    LTX2Pipeline,
    StableAudioPipeline,
    WanImageToVideoPipeline,
    WanVACEPipeline,
    WanVideoToVideoPipeline,
)

BOUND = 1e-4
FLAGS = ("--model", "diffusers", "--wandb", "disabled", "--steps", "2")
SMALL = ("--height", "32", "--width", "48")
VIDEO = ("--option", "video=clip.mp4", "--option", "strength=0.9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The pipelines, and files for them."""
    path = tmp_path_factory.mktemp("files")
    for name, build in {**WITH_FILES, "flux": PIPELINES["flux"]}.items():
        build().save_pretrained(path / name)
    draws = np.random.default_rng(0)
    for name in ("first", "last", "edges"):
        Image.fromarray(draws.integers(0, 256, (32, 48, 3), np.uint8)).save(path / f"{name}.png")
    mask = np.zeros((32, 48, 3), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(path / "mask.png")
    imageio.mimwrite(path / "clip.mp4", draws.integers(0, 256, (5, 32, 48, 3), np.uint8), fps=8)
    imageio.mimwrite(path / "mask.mp4", [mask] * 5, fps=8)
    return path


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)  # paths are relative to it


def options(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--option", pair)]


CASES = {
    "wan-i2v": [*SMALL, "--frames", "5", *options("image=first.png", "last_image=last.png")],
    "wan-v2v": [*SMALL, *VIDEO, "--scheduler", "UniPCMultistepScheduler:flow_shift=1.5,solver_order=1"],
    "wan-vace": [*SMALL, "--frames", "5", *options("video=clip.mp4", "mask=mask.mp4", "reference_images=first.png")],
    "flux-inpaint": [
        *SMALL,
        *options("image=first.png", "mask_image=mask.png", "strength=0.9", "num_images_per_prompt=2"),
        *("--true-cfg-scale", "3", "--negative-prompt", "a dog"),
    ],
    "flux-control": [*SMALL, *options("control_image=edges.png")],
    "stable-audio": options("audio_end_in_s=0.4", "num_waveforms_per_prompt=2"),
    "ltx2": ["--height", "64", "--width", "96", "--frames", "5", *options("frame_rate=8")],
}
"""The flags of a call of each pipeline."""

GUIDED = ("wan-i2v", "wan-v2v", "flux-inpaint", "ltx2")
"""Pipelines whose calls have two guidance branches."""

VARIED = {
    "wan-i2v": [options("image=last.png", "last_image=last.png"), options("image=first.png", "last_image=first.png")],
    "wan-v2v": [options("video=mask.mp4", "strength=0.9"), options("video=clip.mp4", "strength=1"), []],
    "wan-vace": [options("mask=clip.mp4"), options("reference_images=first.png,last.png"), options("video=mask.mp4")],
    "flux-inpaint": [options("image=last.png"), options("mask_image=first.png"), options("strength=0.5")],
    "flux-control": [options("control_image=first.png")],
}
"""Other options of these calls, each of which changes what comes out."""


def numbers(out: Path) -> dict[str, torch.Tensor]:
    (path,) = out.glob("*.safetensors")
    return load_file(path)


def run(name: str, out: Path, flags: list[str]) -> dict[str, torch.Tensor]:
    """What one process makes."""
    assert main([*FLAGS, "--checkpoint", name, *flags, "--cp", "1", "--cfg", "1", "--out", str(out)]) == 0
    return numbers(out)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> dict[str, Path]:
    """What one process makes of each case."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, flags in CASES.items():
            run(name, out / name, flags)
    return {name: out / name for name in CASES}


def on_this_world(folder: str) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """What the ranks of this world make of each case that a layout divides, and the calls that they had to send."""
    silence()
    results = {}
    for layout in (Layout(cfg=1, cp=2), Layout(cfg=2, cp=1)):
        mesh = init_mesh(layout, "cpu")
        for name in CASES if layout.cp == 2 else GUIDED:
            with contextlib.chdir(folder):
                config = parse([*FLAGS, "--checkpoint", name, *CASES[name]])
                model = config.open_model()
                request = prepare_request(model, config.request, layout)
                with CommsCounter(mesh) as comms:
                    made = DiffusersRun(model, mesh, torch.float32).generate(request)
            assert comms.as_dict().keys() == {"cp" if layout.cp == 2 else "cfg"}, name  # they did share the work
            results[name, str(layout)] = [*made.videos, *made.audio]
    return results


def test_two_ranks_make_what_one_makes(folder, alone, tmp_path):
    for made in run_on_every_rank(on_this_world, 2, tmp_path, str(folder)):
        assert len(made) == len(CASES) + len(GUIDED)
        for (name, layout), tensors in made.items():
            expected = [*numbers(alone[name]).values()]
            expected.sort(key=lambda tensor: -tensor.ndim)  # videos, then audio
            assert len(tensors) == len(expected)
            for one, two in zip(expected, tensors, strict=True):
                assert torch.linalg.vector_norm(one - two) <= BOUND * torch.linalg.vector_norm(one), (name, layout)
                assert one.std() > 0.01


@pytest.mark.parametrize("name", VARIED)
def test_every_input_changes_what_comes_out(name, alone, tmp_path):
    given = dict(zip(CASES[name][::2], CASES[name][1::2], strict=True))
    del given["--option"]
    before = [word for word in CASES[name] if "=" in word and ":" not in word]
    known = numbers(alone[name])
    for number, changes in enumerate(VARIED[name]):
        changed = {pair.partition("=")[0]: pair for pair in [*before, *changes[1::2]]}
        flags = {flag: value for flag, value in given.items() if flag != "--scheduler" or changes}  # [] leaves it out
        words = [word for flag in flags.items() for word in flag]
        found = run(name, tmp_path / f"{number}", [*words, *options(*changed.values())])
        key = next(iter(known))
        assert torch.linalg.vector_norm(found[key] - known[key]) > 10 * BOUND * torch.linalg.vector_norm(known[key])


def test_what_comes_out_is_written_as_what_it_is(alone):
    files = {name: {path.name for path in out.iterdir()} - {"metrics.json"} for name, out in alone.items()}
    video = {"video.mp4", "video.gif", "contact_sheet.png", "video.safetensors"}
    assert files["wan-i2v"] == files["wan-v2v"] == files["wan-vace"] == video
    assert files["flux-control"] == {"image.png", "video.safetensors"}
    assert files["flux-inpaint"] == {"image-0.png", "image-1.png", "video.safetensors"}
    assert files["stable-audio"] == {"audio-0.wav", "audio-1.wav", "audio.safetensors"}
    assert files["ltx2"] == {*video, "audio.wav"}
    for number, image in enumerate(numbers(alone["flux-inpaint"]).values()):
        picture = np.asarray(Image.open(alone["flux-inpaint"] / f"image-{number}.png"))
        expected = ((image[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        assert np.array_equal(picture, expected.numpy())
    metrics = json.loads((alone["stable-audio"] / "metrics.json").read_text())
    assert (metrics["frames"], metrics["height"]) == (None, None)


@pytest.mark.parametrize(("name", "fps"), [("wan-i2v", 16), ("ltx2", 8)])
def test_videos_play_at_the_rate_of_their_pipeline(name, fps, alone):
    with imageio.get_reader(alone[name] / "video.mp4") as reader:
        about = reader.get_meta_data()
        assert about["fps"] == fps
        assert sum(1 for _ in reader) == 5
    assert about.get("audio_codec") == ("aac" if name == "ltx2" else None)
    assert Image.open(alone[name] / "video.gif").info["duration"] in (1000 // fps // 10 * 10, 1000 // fps)


@pytest.mark.parametrize(("name", "samples"), [("stable-audio", 640), ("ltx2", None)])
def test_audio_has_the_sampling_rate_of_its_pipeline(name, samples, alone):
    found = numbers(alone[name])
    tensor = found.get("audio", found.get("audio-0"))
    (path, *_) = sorted(alone[name].glob("audio*.wav"))
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels()) == (1600, 2)
        assert file.getnframes() == tensor.shape[1] == (samples or tensor.shape[1])
        written = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2).T / 32767
    assert np.allclose(written, tensor.clamp(-1, 1), atol=1e-4)


def test_phases_are_those_of_the_parts_that_take_the_time(tmp_path, monkeypatch):
    made = DiffusersRun.__init__

    def slowed(run: DiffusersRun, *args: Any, **kwargs: Any) -> None:
        """The parts take longer, as they would on a device, under what measures them."""
        made(run, *args, **kwargs)
        vae = run.pipeline.vae
        for module, seconds in (
            (run.pipeline.text_encoder.encoder.block[0], 0.2),
            (vae.encoder.conv_in, 0.3),
            (run.pipeline.transformer.proj_out, 0.4),
            (vae.decoder.conv_in, 0.5),
        ):  # twice each: two texts, two parts of the video, two branches of the only step, two latent frames
            module.register_forward_pre_hook(lambda module, args, seconds=seconds: time.sleep(seconds / 2))

    monkeypatch.setattr(DiffusersRun, "__init__", slowed)
    out = tmp_path / "out"
    run("wan-v2v", out, CASES["wan-v2v"])
    (seconds,) = json.loads((out / "metrics.json").read_text())["seconds_by_phase"]
    assert seconds["encode"] >= 0.2 + 0.3
    assert seconds["sample"] >= 0.4
    assert seconds["decode"] >= 0.5


def test_every_rank_has_phases_of_its_own(folder, tmp_path):
    flags = [*FLAGS, "--checkpoint", "flux-control", *CASES["flux-control"], "--cp", "2", "--cfg", "1"]
    flags += ["--out", str(tmp_path / "out")]
    ended = start_on_ranks(elsewhere, 2, tmp_path, flags, [str(folder)] * 2, world=False)
    assert ended.exit_codes == [0, 0], ended
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    first, second = metrics["seconds_by_phase"]
    assert first.keys() - second.keys() == {"write"}
    assert second.keys() == {"load", "encode", "sample", "decode", "other"}
    assert sum(first.values()) - first["load"] - first["write"] == pytest.approx(metrics["seconds_total"])
    assert [len(peaks) for peaks in metrics["peak_memory_by_phase"]] == [6, 5]
    assert "rank 0" in ended.stdout[0]
    assert "rank 1" in ended.stdout[0]
    assert ended.stdout[1] == ""


def test_lines_of_a_list_have_options_of_their_own(alone, tmp_path):
    lines = [
        {"name": "same"},
        {"name": "other", "options": {"image": "last.png"}},
        {"name": "without", "options": {"last_image": None}},
        {"name": "bad", "options": {"image": "nowhere.png"}},
        {"name": "worse", "option": ["image=first.png"]},
        {"name": "worst", "options": 3},
    ]
    (tmp_path / "list.txt").write_text(
        "".join(json.dumps({"prompt": "A cat walking on grass.", **line}) + "\n" for line in lines)
    )
    flags = [*FLAGS, "--checkpoint", "wan-i2v", *CASES["wan-i2v"], "--prompts", str(tmp_path / "list.txt")]
    flags += ["--cp", "2", "--cfg", "1", "--dp", "1", "--out", str(tmp_path / "out")]
    ended = start_on_ranks(elsewhere, 2, tmp_path, flags, [str(Path.cwd())] * 2, world=False)
    assert ended.exit_codes == [1, 1], ended
    expected = numbers(alone["wan-i2v"])["video"]
    found = {name: numbers(tmp_path / "out" / name)["video"] for name in ("same", "other", "without")}
    away = {
        name: torch.linalg.vector_norm(clip - expected) / torch.linalg.vector_norm(expected)
        for name, clip in found.items()
    }
    assert away["same"] <= BOUND
    assert min(away["other"], away["without"]) > 0.01
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    errors = {record["line"]: record["error"] for record in records if record["status"] == "failed"}
    assert errors.keys() == {4, 5, 6}
    assert errors[4].startswith("--option image=nowhere.png: nowhere.png cannot be read")
    assert re.match("line: unknown field 'option'; known: name, .*, scheduler, options$", errors[5])
    assert errors[6] == "options: 3 given, needs an object with the pipeline's options by name"
    metrics = json.loads((tmp_path / "out" / "other" / "metrics.json").read_text())
    assert metrics["options"]["option"] == ["image=last.png", "last_image=last.png"]
    assert metrics["inputs"].keys() == {"last.png"}


def test_resume_notices_another_file_of_the_same_name(tmp_path, monkeypatch, capfd, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a cat\n")
    Image.new("RGB", (48, 32), (200, 10, 10)).save("image.png")
    flags = [*FLAGS, "--checkpoint", str(folder / "flux-control"), *SMALL, "--option", "control_image=image.png"]
    flags += ["--prompts", "list.txt", "--cp", "1", "--cfg", "1", "--out", "out"]
    assert main(flags) == 0
    assert main([*flags, "--resume"]) == 0
    assert "1 of 1 are complete" in capfd.readouterr().out
    Image.new("RGB", (48, 32), (10, 200, 10)).save("image.png")
    assert main([*flags, "--resume"]) == 2
    assert "--resume: 0001-a-cat was made with inputs {'image.png': " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("wan-i2v", [], "--option: a WanImageToVideoPipeline needs image; give it with --option image=FILE"),
        ("wan-v2v", [], "--option: a WanVideoToVideoPipeline needs video; give it with --option video=FILE"),
        ("wan-i2v", options("image=nowhere.png"), "--option image=nowhere.png: nowhere.png cannot be read"),
        ("wan-i2v", options("image=clip.mp4"), "--option image=clip.mp4: a WanImageToVideoPipeline refuses it: "),
        ("wan-i2v", options("image=wan-i2v"), "--option image: 'wan-i2v' given, needs a file"),
        ("wan-i2v", options("image"), "--option image: has no value; write NAME=VALUE"),
        ("flux", options("image=first.png"), "--option image: is no option of a FluxPipeline; the nearest are"),
        ("flux", options("guidance_scale=3"), "--option guidance_scale: has a flag of its own; use --guidance-scale"),
        ("flux", ["--scheduler", "Euler"], "--scheduler Euler: Euler is no scheduler of diffusers"),
        (
            "wan-v2v",
            [*SMALL, *VIDEO, *options("num_videos_per_prompt=2")],
            "--option num_videos_per_prompt=2: a WanVideoToVideoPipeline makes 1 whatever is given; leave it out",
        ),
        (  # no step is left
            "wan-v2v",
            [*SMALL, *options("video=clip.mp4", "strength=0.1")],
            "--option video=clip.mp4, --option strength=0.1: a WanVideoToVideoPipeline fails with this before it s",
        ),
    ],
)
def test_bad_options_are_one_line(name, flags, message, tmp_path, capfd):
    assert main([*FLAGS, "--checkpoint", name, *flags, "--cp", "1", "--cfg", "1", "--out", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr().err
    assert len(re.findall(rf"^{re.escape(message)}", printed, re.MULTILINE)) == 1, printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def elsewhere(flags: list[str], folders: list[str]) -> None:
    """`meshdiff run` in another folder on each rank, as on machines with files of their own."""
    os.chdir(folders[int(os.environ["RANK"])])
    raise SystemExit(command(flags))


@pytest.mark.parametrize(
    ("other", "as_list", "message"),
    [
        ("image", False, r"image.png of --option: is \w{64} on rank 0 and \w{64} on rank 1; start every rank"),
        ("none", False, r"rank 1 of 2: --option control_image=image.png: image.png cannot be read"),
        (
            "none",
            True,
            r"line 1 of --prompts: is good on other ranks, and on rank 1 it is not: --option control_image=",
        ),
    ],
)
def test_files_that_differ_by_rank_are_one_line_on_both(other, as_list, message, folder, tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for number, place in enumerate(folders):
        place.mkdir()
        (place / "list.txt").write_text("a cat\n")
        if number == 0 or other == "image":
            Image.new("RGB", (48, 32), (200, 10, 10 * number)).save(place / "image.png")
    flags = [*FLAGS, "--checkpoint", str(folder / "flux-control"), *SMALL, "--option", "control_image=image.png"]
    flags += [
        "--cp",
        "2",
        "--cfg",
        "1",
        "--out",
        str(tmp_path / "out"),
        *(["--prompts", "list.txt"] if as_list else []),
    ]
    ended = start_on_ranks(elsewhere, 2, tmp_path, flags, [str(place) for place in folders], world=False)
    assert ended.exit_codes == [2, 2], ended
    assert len(re.findall(message, "".join(ended.stderr))) == 1, ended
    assert all(re.search(message, report) for report in ended.reports), ended.reports
    assert "Traceback" not in "".join(ended.stderr)
