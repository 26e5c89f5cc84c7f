"""Folders that are no Wan checkpoint, or a broken one: one error that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_wan import checkpoint

from meshdiff import InputError, Layout, Pipeline, Request, init_mesh, simulate
from meshdiff.cli.run import main
from meshdiff.models import WanModel

TRANSFORMER = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole / "diffusers", tmp_path / "wan"))


def edit_json(name: str, **values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def edit_tensors(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / name)
        edit(tensors)
        save_file(tensors, folder / name)

    return rewrite


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-64])


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def pickle_only(folder: Path) -> None:
    for path in folder.glob("transformer/*model*"):
        path.unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")


CONFIG, INDEX = "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors.index.json"
VAE, SCHEDULER = "vae/config.json", "scheduler/scheduler_config.json"
BROKEN = {
    "no index": (remove("model_index.json"), "--checkpoint: .* is no Wan checkpoint: it has neither model_index.json"),
    "another pipeline": (edit_json("model_index.json", _class_name="FluxPipeline"), "holds a FluxPipeline; this takes"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "config.json cannot be read as JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "config.json holds no JSON object"),
    "another class": (edit_json(CONFIG, _class_name="Flux"), "_class_name is 'Flux'; this takes WanTransformer3DModel"),
    "image to video": (edit_json(CONFIG, in_channels=36), "an image-to-video transformer"),
    "added keys": (edit_json(CONFIG, added_kv_proj_dim=48), "an image-to-video transformer"),
    "text for a number": (edit_json(CONFIG, num_layers="2"), "num_layers is '2', needs a whole number above 0"),
    "no layers": (edit_json(CONFIG, num_layers=0), "num_layers is 0"),
    "odd heads": (edit_json(CONFIG, attention_head_dim=13), "52 channels on 4 heads; heads need an even number"),
    "two patches": (edit_json(CONFIG, patch_size=[2, 2]), r"patch_size is \[2, 2\], needs three whole numbers"),
    "more layers": (
        edit_json(CONFIG, num_layers=3),
        r"tensors missing: blocks.2.* and \d+ more",
    ),
    "far too many layers": (edit_json(CONFIG, num_layers=10**6), r"num_layers is 1000000; the weights are \d+ tensors"),
    "a number too large": (edit_json(CONFIG, ffn_dim=10**30), "ffn_dim is 10+, needs a whole number"),
    "deep JSON": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "config.json cannot be read as JSON"),
    "a boundary of 875": (edit_json("model_index.json", boundary_ratio=875), "boundary_ratio is 875, needs a number"),
    "an index of nothing": (edit_json(INDEX, weight_map={}), "is no index of safetensors files"),
    "an index of null": (edit_json(INDEX, weight_map={"x": None}), "is no index of safetensors files"),
    "an index elsewhere": (edit_json(INDEX, weight_map={"x": "../../x.safetensors"}), "it has to name files beside it"),
    "8-bit weights": (
        edit_tensors(TRANSFORMER, lambda t: t.update({"proj_out.weight": t["proj_out.weight"].to(torch.int8)})),
        "of a kind that is no floating-point number: proj_out.weight I8",
    ),
    "another kind of diffusion": (
        edit_json(SCHEDULER, prediction_type="epsilon"),
        "is 'epsilon'; Wan's is 'flow",
    ),
    "no flow": (edit_json(SCHEDULER, use_flow_sigmas=False), "use_flow_sigmas is False; Wan's is True"),
    "no mean": (edit_json(VAE, latents_mean=None), "latents_mean is None, needs 16 numbers"),
    "one deviation": (edit_json(VAE, latents_std=[1.0]), r"latents_std is \[1.0\], needs 16 numbers"),
    "no deviation": (edit_json(VAE, latents_std=[0.0] * 16), "latents_std is .*, needs numbers above 0"),
    "another stride": (edit_json(VAE, scale_factor_spatial="8"), "scale_factor_spatial is '8', needs 8, which is what"),
    "another rate": (edit_json(VAE, scale_factor_temporal=2), "scale_factor_temporal is 2, needs 4"),
    "a patch of 2": (edit_json(VAE, patch_size=2), "patch_size is 2, needs a whole number whose square divides"),
    "a deep encoder": (edit_json("text_encoder/config.json", num_layers=10**6), "num_layers is 1000000; the weights"),
    "fewer layers": (edit_json(CONFIG, num_layers=1), r"tensors unexpected: blocks.1.* and \d+ more"),
    "wider layers": (edit_json(CONFIG, ffn_dim=65), r"of another shape: blocks.0.*ffn.* \[64\] instead of \[65\]"),
    "a tensor too few": (edit_tensors(TRANSFORMER, lambda t: t.pop("proj_out.bias")), "tensors missing: proj_out.bias"),
    "a tensor too many": (
        edit_tensors(TRANSFORMER, lambda t: t.update(extra=torch.ones(1))),
        "tensors unexpected: extra",
    ),
    "a truncated shard": (truncate(TRANSFORMER), f"{TRANSFORMER} cannot be read as safetensors"),
    "a lost shard": (remove(TRANSFORMER), "lacks diffusion_pytorch_model-00002-of-00002.safetensors, which its index"),
    "a broken index": (
        lambda folder: (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text("{}"),
        "is no index of safetensors files",
    ),
    "pickled": (pickle_only, "holds diffusion_pytorch_model.bin, which would have to be unpickled"),
    "no VAE": (remove("vae"), "--components: .* lacks vae; name a folder in diffusers' layout"),
    "no tokenizer": (remove("tokenizer/tokenizer.json"), "tokenizer holds neither tokenizer.json nor spiece.model"),
    "a truncated VAE": (truncate("vae/diffusion_pytorch_model.safetensors"), "cannot be read as safetensors"),
    "a truncated encoder": (truncate("text_encoder/model.safetensors"), "cannot be read as safetensors"),
    "another VAE": (edit_json("vae/config.json", z_dim=8), "has z_dim 8; the transformer needs 16"),
    "another encoder": (edit_json("text_encoder/config.json", d_model=64), "has d_model 64; the transformer needs 32"),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN.values(), ids=list(BROKEN))
def test_broken_checkpoints_are_refused_before_anything_is_read(breaks, message, folder):
    breaks(folder)
    with pytest.raises(InputError, match=message) as error:
        WanModel.open(str(folder))
    assert "\n" not in str(error.value)


SMALL = Request("a cat", frames=1, height=16, width=32, steps=1)
BROKEN_LATER = {
    "an encoder's tensor": (
        edit_tensors("text_encoder/model.safetensors", lambda t: t.pop("encoder.final_layer_norm.weight")),
        "--checkpoint: .*text_encoder does not fit its configuration; tensors missing: encoder.final_layer_norm",
    ),
    "a VAE's tensor": (
        edit_tensors("vae/diffusion_pytorch_model.safetensors", lambda t: t.pop("decoder.conv_in.bias")),
        "--checkpoint: .*vae does not fit its configuration; tensors missing: decoder.conv_in.bias",
    ),
    "a number that is none": (
        edit_tensors(TRANSFORMER, lambda t: t["proj_out.bias"].fill_(torch.nan)),
        "--checkpoint: proj_out.bias in .*transformer not made of finite numbers",
    ),
    "a solver that is none": (
        edit_json(SCHEDULER, solver_type="bogus"),
        "--checkpoint: .*scheduler cannot be read .*bogus",
    ),
    "no padding": (
        edit_json("tokenizer/tokenizer_config.json", pad_token=None),
        "--checkpoint: .*tokenizer cannot be read",
    ),
    "a broken tokenizer": (
        lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{}"),
        "--checkpoint: .*tokenizer cannot be read",
    ),
}


@pytest.mark.parametrize(("breaks", "message"), BROKEN_LATER.values(), ids=list(BROKEN_LATER))
def test_nothing_is_filled_with_random_numbers(breaks, message, folder):
    breaks(folder)
    with simulate(1), pytest.raises(InputError, match=message) as error:
        Pipeline(WanModel.open(str(folder)), init_mesh(Layout(), "cpu")).generate(SMALL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--checkpoint: is missing; name a folder or a hub id"),
        (["--checkpoint", "nowhere"], "--checkpoint: nowhere is no folder"),
        (["--checkpoint", __file__], "--checkpoint: .* is no folder"),
        (
            ["--checkpoint", "Wan-AI/None-Such"],
            "Wan-AI/None-Such is no local folder .* hf download",
        ),
        (["--checkpoint", "{original}"], "--components: .* lacks text_encoder, tokenizer, vae"),
        (["--checkpoint", "{diffusers}", "--frames", "82"], r"--frames: 82 given; this model makes 4 n \+ 1"),
        (["--checkpoint", "{diffusers}", "--tile", "100"], "--tile: 100 "),
        (["--checkpoint", "{diffusers}", "--frames=1", "--height=16", "--width=16"], "--height: .* a single token"),
        (["--checkpoint", "{diffusers}", "--weights", "x"], "--weights: is for --model digits; this is --model wan"),
        (
            ["--checkpoint", "{diffusers}", "--cp", "7", "--frames", "1", "--height", "32", "--width", "48"],
            "--cp: 7 ranks",
        ),
    ],
)
def test_bad_flags_are_one_line(flags, message, whole, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folders = {"{original}": str(whole / "original"), "{diffusers}": str(whole / "diffusers")}
    assert main(["--model", "wan", "--wandb", "disabled", *(folders.get(flag, flag) for flag in flags)]) == 2
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1
    with pytest.raises(InputError, match=message):
        raise InputError(*printed.err.strip().split(": ", 1))
    assert list(tmp_path.iterdir()) == []
