"""Pipelines of diffusers, untouched: the same images, the calls of a step at once."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler
from pipeline_cases import of_pipelines
from ranks import run_command, run_on_ranks
from safetensors.torch import load_file, save_file

from experiments.tiny_models.pipelines import CALLS, PIPELINES
from meshdiff.cli.run import main

BOUND = 1e-4
FLAGS = ("--model", "diffusers", "--wandb", "disabled", "--steps", "2", "--height", "80", "--width", "112")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_pipelines_on_real_ranks_make_the_same_images(ranks, tmp_path):
    results = run_on_ranks(of_pipelines, ranks, tmp_path)
    guided = results.pop("guidance")
    assert results.keys() == PIPELINES.keys()
    for name, of_all in results.items():
        assert len(of_all) == ranks
        assert len(of_all[0][0]) == 2  # images on rank 0
        for errors, _, once_removed, replicated in of_all:
            assert max(errors) <= BOUND, name
            if name == "wan" and ranks % 2 == 0:  # to the bit, images too where every rank decodes
                assert max(errors if ranks == 2 else errors[:1]) == 0.0
            assert once_removed == 0.0, name
            assert replicated == [], name
    if ranks % 2 == 0:
        for name, of_all in results.items():
            steps = CALLS[name]["num_inference_steps"]
            for _, traffic, *_ in of_all:
                gathers = traffic["cfg"]["all_gather"]
                assert traffic["cfg"] == {"all_gather": {"count": steps, "bytes": gathers["bytes"]}}, name
        for of_rank in guided:
            assert of_rank["together"] == ([[6.0] * 3], 1)  # one run for two calls
            assert of_rank["alone"] == ([[2.0] * 3], 2)
            assert of_rank["three"] == ([[12.0] * 3], 4)  # two at once, and one on all ranks
            assert of_rank["written after"] == ([[2.0] * 3], 5)
            assert of_rank["batch"] == [[[4.0] * 3, [8.0] * 3]] * 2  # whose rows cannot be taken apart


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Pipelines, and what is left of one after this and that."""
    path = tmp_path_factory.mktemp("pipelines")
    for name in ("flux", "wan"):
        PIPELINES[name]().save_pretrained(path / name)
    for name, damage in DAMAGES.items():
        shutil.copytree(path / "flux", path / name)
        damage(path / name)
    shutil.copytree(path / "wan", path / "drawing")
    edit(path / "drawing" / "model_index.json", scheduler=["diffusers", "DPMSolverSinglestepScheduler"])
    DRAWING.save_pretrained(path / "drawing" / "scheduler")
    return path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Draws from the global generator, as Wan gives it none, and keeps a setting that an odd number of steps asks for.
DRAWING = DPMSolverSinglestepScheduler(
    algorithm_type="sde-dpmsolver++",
    lower_order_final=False,
    final_sigmas_type="sigma_min",
    use_flow_sigmas=True,
    prediction_type="flow_prediction",
)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DAMAGES = {
    "bare": lambda folder: (folder / WEIGHTS).unlink(),
    "cut": lambda folder: os.truncate(folder / WEIGHTS, 1000),
    "garbled": lambda folder: (folder / "vae" / "config.json").write_text("{"),
    "deeper": lambda folder: edit(folder / "transformer" / "config.json", num_layers=7),
    "newer": lambda folder: edit(folder / "model_index.json", transformer=["diffusers", "StrangeModel"]),
    "strange": lambda folder: edit(folder / "model_index.json", _class_name="Strange"),
    "promptless": lambda folder: edit(folder / "model_index.json", _class_name="DDPMPipeline"),
    "unnamed": lambda folder: (folder / "model_index.json").write_text("{}"),
}
AGAIN = r"cannot be read \(.*\); .*: download the folder again, or name another$"
NO_INDEX = r"model_index.json cannot be read \(.*\); name the folder of a pipeline, as `hf download"
TWO = r"this run has 1 guidance branch \(two need --true-cfg-scale above 1 and a --negative-prompt\); use --cfg 1$"


def clip(world_size: int, flags: list[str], folder: Path) -> None:
    """Makes it in this process, or on forked ranks."""
    codes = [main(flags)] if world_size == 1 else run_command(flags, world_size, folder).exit_codes
    assert not any(codes)


def test_a_folder_is_run_like_any_other_model(folders, tmp_path):
    (tmp_path / "list.txt").write_text('a cat\n{"prompt": "a dog", "seed": 3, "guidance_scale": 2.0}\n{"frames": 4}\n')
    flags = [*FLAGS, "--checkpoint", str(folders / "flux"), "--prompts", str(tmp_path / "list.txt")]
    assert main([*flags, "--cp", "1", "--cfg", "1", "--out", str(tmp_path / "one")]) == 1  # a line is bad
    on_two = [*flags, "--cp", "2", "--cfg", "1", "--dp", "1", "--out", str(tmp_path / "two")]
    assert run_command(on_two, 2, tmp_path).exit_codes == [1, 1]
    for name in ("0001-a-cat", "0002-a-dog"):
        one, two = (load_file(tmp_path / n / name / "video.safetensors")["video"] for n in ("one", "two"))
        assert one.shape == (1, 3, 80, 112)
        assert one.std() > 0.01
        assert torch.linalg.vector_norm(one - two) <= BOUND * torch.linalg.vector_norm(one)
    metrics = json.loads((tmp_path / "two" / "0002-a-dog" / "metrics.json").read_text())
    assert (metrics["frames"], metrics["height"], metrics["guidance_scale"], metrics["seed"]) == (1, 80, 2.0, 3)
    assert metrics["comms"]["cp"]["all_to_all"]["count"] > 0
    assert metrics["parts"].keys() == {"transformer", "text_encoder", "text_encoder_2", "vae.decoder"}
    assert metrics["parts"]["vae.decoder"] == "Decoder on 2 ranks: 100% of its operations are sharded"
    assert metrics["shard_text"] is metrics["shard_vae"] is True
    records = [json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
    assert [r["error"] for r in records if r["status"] == "failed"] == [
        "--frames: is no option of a FluxPipeline; leave it out"
    ]
    before = (tmp_path / "two" / "0001-a-cat" / "metrics.json").stat().st_mtime_ns
    assert run_command([*on_two, "--resume"], 2, tmp_path).exit_codes == [1, 1]
    assert (tmp_path / "two" / "0001-a-cat" / "metrics.json").stat().st_mtime_ns == before


def test_a_clip_depends_on_its_request_alone(folders, tmp_path):
    (tmp_path / "list.txt").write_text('{"prompt": "a dog", "seed": 3, "steps": 3}\na cat\n')  # the longer one is first
    flags = [*FLAGS, "--frames", "5", "--checkpoint", str(folders / "drawing"), "--cfg", "1"]
    clips = []
    for name, more in (
        ("one", ["--prompt", "a cat"]),
        ("again", ["--prompt", "a cat"]),
        ("second", ["--prompts", str(tmp_path / "list.txt")]),
        ("ranks", ["--prompts", str(tmp_path / "list.txt"), "--dp", "1"]),
    ):
        ranks = 2 if name == "ranks" else 1
        clip(ranks, [*flags, *more, "--cp", str(ranks), "--out", str(tmp_path / name)], tmp_path)
        (video,) = [path for path in (tmp_path / name).rglob("video.safetensors") if "dog" not in str(path)]
        clips.append(load_file(video)["video"])
        torch.rand(1)  # the next one finds another state
    one, again, second, ranks = clips
    assert torch.equal(one, again)
    assert torch.equal(one, second)
    assert torch.linalg.vector_norm(one - ranks) <= BOUND * torch.linalg.vector_norm(one)


def test_weights_that_no_file_has_are_the_same_every_time(folders, tmp_path):
    folder = shutil.copytree(folders / "flux", tmp_path / "flux")
    (file,) = (folder / "text_encoder_2").glob("*.safetensors")
    tensors = load_file(file)
    del tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]  # transformers draws one then
    save_file(tensors, file, metadata={"format": "pt"})
    clips = []
    for name in ("one", "again"):
        flags = ["--checkpoint", str(folder), "--cp", "1", "--cfg", "1", "--out", str(tmp_path / name)]
        assert main([*FLAGS, *flags]) == 0
        clips.append(load_file(tmp_path / name / "video.safetensors")["video"])
    assert torch.equal(*clips)


def test_captured_steps_make_the_same_clip(folders, tmp_path):
    flags = [*FLAGS[:-6], "--steps", "7", *FLAGS[-4:], "--checkpoint", str(folders / "flux"), "--cfg", "1"]
    videos = []
    for ranks, capture in ((1, []), (1, ["--capture"]), (2, ["--capture"])):
        out = tmp_path / f"{ranks}{len(capture)}"
        clip(ranks, [*flags, "--cp", str(ranks), *capture, "--out", str(out)], tmp_path)
        videos.append(load_file(out / "video.safetensors")["video"])
        told = json.loads((out / "metrics.json").read_text())["captured"]
        assert told.keys() == ({"transformer"} if capture else set())
        assert all(words.startswith("Captured: ") for words in told.values())
    assert torch.equal(videos[0], videos[1])
    assert torch.linalg.vector_norm(videos[0] - videos[2]) <= BOUND * torch.linalg.vector_norm(videos[0])


@pytest.mark.parametrize(
    ("name", "layout", "flags"),
    [
        ("flux", ["--cp", "2", "--cfg", "1"], ["--shard-weights", "--low-memory", "3"]),
        ("wan", ["--cfg", "2", "--frames", "5"], ["--shard-weights"]),
    ],
)
def test_weights_that_are_stored_elsewhere_make_the_same_clip(name, layout, flags, folders, tmp_path):
    small = [*FLAGS[:-4], "--height", "32", "--width", "48", "--checkpoint", str(folders / name), *layout]
    videos, gathers = [], []
    for number, weights in enumerate(([], flags)):
        out = tmp_path / f"{number}"
        clip(2, [*small, *weights, "--out", str(out)], tmp_path)
        videos.append(load_file(out / "video.safetensors")["video"])
        metrics = json.loads((out / "metrics.json").read_text())
        gathers.append(sum(of_dim["all_gather"]["count"] for of_dim in metrics["comms"].values()))
        parts = {"transformer", "text_encoder", "text_encoder_2"} if name == "flux" else {"text_encoder"}
        parts.add("vae")
        assert metrics["stored_weights"].keys() == (parts if weights else set())
        assert all("divided between 2 ranks" in words for words in metrics["stored_weights"].values())
    assert torch.equal(*videos)
    assert gathers[0] < gathers[1]


def test_a_list_may_leave_the_steps_to_the_pipeline(folders, tmp_path):
    (tmp_path / "list.txt").write_text("a cat\n")
    flags = ["--model", "diffusers", "--wandb", "disabled", "--height", "16", "--width", "16"]
    flags += ["--checkpoint", str(folders / "flux"), "--prompts", str(tmp_path / "list.txt")]
    assert main([*flags, "--cp", "1", "--cfg", "1", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "0001-a-cat" / "metrics.json").read_text())["steps"] == 28


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint: is missing; name the folder of a pipeline"),
        (["--checkpoint", "nowhere"], f"--checkpoint: nowhere/{NO_INDEX}"),
        (["--checkpoint", "unnamed"], f"--checkpoint: unnamed/{NO_INDEX}"),
        (["--checkpoint", "strange"], "--checkpoint: strange is a Strange, which diffusers .*; install one that has"),
        (["--checkpoint", "promptless"], "--checkpoint: promptless is a .*, which takes no prompt; name the folder of"),
        *((["--checkpoint", name], f"--checkpoint: {name} {AGAIN}") for name in ("bare", "cut", "garbled")),
        *((["--checkpoint", name], f"--checkpoint: {name} {AGAIN}") for name in ("deeper", "newer")),
        (["--checkpoint", "flux", "--capture", "--shard-weights"], "--capture: needs the transformer's weights where"),
        (
            ["--checkpoint", "flux", "--compile", "--low-memory", "3"],
            "--compile: needs the transformer's weights where",
        ),
        (["--checkpoint", "flux", "--strategy", "hybrid"], "--strategy hybrid: is not for --model diffusers"),
        (["--checkpoint", "flux", "--frames", "9"], "--frames: is no option of a FluxPipeline"),
        (["--checkpoint", "flux", "--shift", "3"], "--shift: is the pipeline's own"),
        (["--checkpoint", "flux", "--cfg", "2", "--true-cfg-scale", "4", "--negative-prompt", ""], f"--cfg 2: {TWO}"),
        (
            ["--checkpoint", "wan", "--cfg", "2", "--guidance-scale", "1"],
            "--cfg 2: .*two need --guidance-scale above 1",
        ),
        (
            ["--checkpoint", "wan", "--height", "50"],
            "--height, --width: a WanPipeline refuses it: --height and --width have to be divisible by 16 but are 50 ",
        ),
    ],
)
def test_bad_input_is_one_line(flags, message, folders, monkeypatch, capfd):
    monkeypatch.chdir(folders)
    before = sorted(folders.iterdir())
    code = main([*FLAGS, *flags])
    error = capfd.readouterr().err.splitlines()
    assert code == 2
    assert re.match(message, [line for line in error if line.startswith("--")][-1])
    assert not any("Traceback" in line for line in error)
    assert sorted(folders.iterdir()) == before
