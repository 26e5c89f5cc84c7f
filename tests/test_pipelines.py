"""Pipelines of diffusers, untouched: the same images, the calls of a step at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from run import main
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES

BOUND = 1e-4
FLAGS = ("--model", "diffusers", "--wandb", "disabled", "--steps", "2", "--height", "80", "--width", "112")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_pipelines_on_real_ranks_make_the_same_images(ranks, tmp_path):
    results = run_on_ranks("pipelines", ranks, tmp_path)
    guided = results.pop("guidance")
    assert results.keys() == PIPELINES.keys()
    assert {name: found[0] <= BOUND for name, found in results.items()} == dict.fromkeys(results, True)
    assert {name: found[3] for name, found in results.items()} == dict.fromkeys(results, 0.0)  # as before, once removed
    if ranks % 2 == 0:
        assert results["wan"][0] == 0.0  # to the bit
        for name, (_, traffic, steps, _) in results.items():
            for of_rank in traffic:
                assert of_rank["cfg"] == {
                    "all_gather": {"count": steps, "bytes": of_rank["cfg"]["all_gather"]["bytes"]}
                }, name
        for of_rank in guided:
            assert of_rank["together"] == ([[6.0] * 3], 1)  # one run for two calls
            assert of_rank["alone"] == ([[2.0] * 3], 2)
            assert of_rank["three"] == ([[12.0] * 3], 4)  # two at once, and one on all ranks
            assert of_rank["written after"] == ([[2.0] * 3], 5)
            assert of_rank["batch"] == [[[4.0] * 3, [8.0] * 3]] * 2  # whose rows cannot be taken apart


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "tiny-flux"
    PIPELINES["flux"]().save_pretrained(path)
    return path


def test_a_folder_is_run_like_any_other_model(folder, tmp_path):
    (tmp_path / "list.txt").write_text('a cat\n{"prompt": "a dog", "seed": 3, "guidance_scale": 2.0}\n{"frames": 4}\n')
    flags = [*FLAGS, "--checkpoint", str(folder), "--prompts", str(tmp_path / "list.txt")]
    assert main([*flags, "--cp", "1", "--cfg", "1", "--out", str(tmp_path / "one")]) == 1  # a line is bad
    assert main([*flags, "--cp", "2", "--cfg", "1", "--dp", "1", "--out", str(tmp_path / "two")]) == 1
    for name in ("0001-a-cat", "0002-a-dog"):
        one, two = (load_file(tmp_path / n / name / "video.safetensors")["video"] for n in ("one", "two"))
        assert one.shape == (1, 3, 80, 112)
        assert one.std() > 0.01
        assert torch.linalg.vector_norm(one - two) <= BOUND * torch.linalg.vector_norm(one)
    metrics = json.loads((tmp_path / "two" / "0002-a-dog" / "metrics.json").read_text())
    assert (metrics["frames"], metrics["height"], metrics["guidance_scale"], metrics["seed"]) == (1, 80, 2.0, 3)
    assert metrics["comms"]["cp"]["all_to_all"]["count"] > 0
    records = [json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
    assert [r["error"] for r in records if r["status"] == "failed"] == [
        "--frames: is no option of a FluxPipeline; leave it out"
    ]
    before = (tmp_path / "two" / "0001-a-cat" / "metrics.json").stat().st_mtime_ns
    assert main([*flags, "--cp", "2", "--cfg", "1", "--dp", "1", "--out", str(tmp_path / "two"), "--resume"]) == 1
    assert (tmp_path / "two" / "0001-a-cat" / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint: is missing; name the folder of a pipeline"),
        (["--checkpoint", "nowhere"], "--checkpoint: nowhere/model_index.json cannot be read"),
        (["--checkpoint", "strange"], "--checkpoint: strange is a Strange, which diffusers"),
        (["--checkpoint", "FLUX", "--compile"], "--compile: is not for --model diffusers"),
        (["--checkpoint", "FLUX", "--shard-weights"], "--shard-weights: is not for --model diffusers"),
        (["--checkpoint", "FLUX", "--strategy", "hybrid"], "--strategy hybrid: is not for --model diffusers"),
        (["--checkpoint", "FLUX", "--frames", "9"], "--frames: is no option of a FluxPipeline"),
        (["--checkpoint", "FLUX", "--shift", "3"], "--shift: is the pipeline's own"),
        (["--checkpoint", "damaged"], "--checkpoint: damaged cannot be read"),
    ],
)
def test_bad_input_is_one_line(flags, message, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, kind in (("strange", "Strange"), ("damaged", "FluxPipeline")):
        Path(name).mkdir()
        Path(name, "model_index.json").write_text(
            json.dumps({"_class_name": kind, "vae": ["diffusers", "AutoencoderKL"]})
        )
    code = main([*FLAGS, *(str(folder) if flag == "FLUX" else flag for flag in flags)])
    error = capfd.readouterr().err.splitlines()
    assert code == 2
    assert [line for line in error if line.startswith("--")][-1].startswith(message)
    assert not any("Traceback" in line for line in error)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "strange"]
