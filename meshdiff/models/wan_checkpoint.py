"""The contents of a Wan checkpoint folder: configurations, and the tensors that each parameter is made of.

Two layouts are read. That of diffusers has `model_index.json` and a folder for
each component; that of Wan's own repository has `config.json` beside the
weights of the transformer (Wan2.2: in `high_noise_model` and
`low_noise_model`), and its text encoder and VAE are pickled, so they come from
a folder in the other layout.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from meshdiff.errors import InputError
from meshdiff.models.checkpoint import Source, WeightFiles, find_weights
from meshdiff.models.wan import WanConfig, WanTransformer

__all__ = ["Expert", "WanCheckpoint", "open_checkpoint"]

CHECKPOINT, COMPONENTS = "--checkpoint", "--components"
PARTS = ("text_encoder/*", "tokenizer/*", "vae/*", "scheduler/*")
"""Files that `--components` is read for."""

NameStyle = Literal["diffusers", "original"]

LARGEST = 10**7
"""Upper limit of any dim of a model; larger numbers are mistakes, on which torch does not raise a clear error."""

BOUNDARY = 0.875
"""Boundary of Wan2.2-T2V-A14B, whose own layout does not store it: the first expert is for times from this one up."""

UNIPC: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "flow_shift": 3.0,
}
"""Settings of `diffusers.UniPCMultistepScheduler` that Wan ships, where they are not its defaults."""


@dataclass(frozen=True)
class Expert:
    """A transformer in a checkpoint."""

    config: WanConfig
    weights: WeightFiles
    sources: Mapping[str, Source]


@dataclass(frozen=True)
class WanCheckpoint:
    """A checkpoint whose files are known to fit each other; no weights have been read.

    Attributes:
        folder: the local folder of the checkpoint.
        experts: the transformer; of Wan2.2, the one for much noise and the one for little.
        boundary: the time, 1 being noise, below which the last expert takes over.
        components: the folder of text encoder, tokenizer and VAE.
        flag: the flag that named `components`.
        vae: the VAE's configuration.
        text: the text encoder's configuration.
        scheduler: settings of diffusers' UniPC scheduler.
    """

    folder: Path
    experts: tuple[Expert, ...]
    boundary: float
    components: Path
    flag: str
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: UNIPC)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that one latent covers."""
        space = self.vae.get("scale_factor_spatial", 8)
        return self.vae.get("scale_factor_temporal", 4), space, space


def open_checkpoint(name: str, components: str | None = None) -> WanCheckpoint:
    """Read and check the configurations of a folder, or of a repository on the Hugging Face hub.

    Args:
        name: a local folder in either layout, or a hub id such as
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", which is downloaded if it can be.
        components: the same, for text encoder, tokenizer, VAE and scheduler; by default `name`.

    Raises:
        InputError: if anything is missing, broken, or of another model.
    """
    folder = local_folder(name, CHECKPOINT, ("*",))
    index = folder / "model_index.json"
    boundary = BOUNDARY
    if index.is_file():
        listed = read_json(index, CHECKPOINT)
        if listed.get("_class_name") != "WanPipeline":
            raise InputError(CHECKPOINT, f"{folder} holds a {listed.get('_class_name')}; this takes a WanPipeline")
        second = listed.get("transformer_2")
        names = ["transformer", "transformer_2"] if isinstance(second, list) and any(second) else ["transformer"]
        boundary = BOUNDARY if listed.get("boundary_ratio") is None else listed["boundary_ratio"]
        if not (_is_number(boundary) and 0 < boundary < 1):
            raise InputError(CHECKPOINT, f"{index}: boundary_ratio is {boundary!r}, needs a number between 0 and 1")
    elif (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        names = ["high_noise_model", "low_noise_model"]
    elif (folder / "config.json").is_file():
        names = ["."]
    else:
        raise InputError(
            CHECKPOINT,
            f"{folder} is no Wan checkpoint: it has neither model_index.json (diffusers' layout) nor config.json "
            "(Wan's own)",
        )
    experts = tuple(open_expert(folder / name) for name in names)
    shapes = {(expert.config.channels, expert.config.patch, expert.config.head_dim) for expert in experts}
    if len(shapes) > 1 or len({expert.config.text_dim for expert in experts}) > 1:
        raise InputError(CHECKPOINT, f"{folder} holds two transformers that do not read and write the same latents")
    parts = local_folder(components, COMPONENTS, PARTS) if components else folder
    flag = COMPONENTS if components else CHECKPOINT
    missing = [part for part in ("text_encoder", "tokenizer", "vae") if not (parts / part).is_dir()]
    if missing:
        raise InputError(
            COMPONENTS,
            f"{parts} lacks {', '.join(missing)}; name a folder in diffusers' layout that has them, for instance "
            "from: hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --exclude 'transformer/*' --local-dir components",
        )
    if not any((parts / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        # transformers would make up an empty one.
        raise InputError(flag, f"{parts / 'tokenizer'} holds neither tokenizer.json nor spiece.model")
    vae, text = (read_json(parts / part / "config.json", flag) for part in ("vae", "text_encoder"))
    # Broken files are better found before an hour of sampling than after it.
    find_weights(parts / "vae", flag)
    _check_depth(parts / "text_encoder" / "config.json", text, find_weights(parts / "text_encoder", flag, "model"))
    fits = {"vae": ("z_dim", vae.get("z_dim", 16), experts[0].config.channels)}
    fits["text_encoder"] = ("d_model", text.get("d_model"), experts[0].config.text_dim)
    for part, (key, given, needed) in fits.items():
        if given != needed:
            raise InputError(flag, f"{parts / part / 'config.json'} has {key} {given}; the transformer needs {needed}")
    _check_vae(parts / "vae" / "config.json", vae, flag)
    scheduler_file = parts / "scheduler" / "scheduler_config.json"
    scheduler = read_scheduler(scheduler_file, flag) if scheduler_file.is_file() else UNIPC
    return WanCheckpoint(folder, experts, float(boundary), parts, flag, vae, text, scheduler)


def open_expert(folder: Path) -> Expert:
    """A transformer's folder, its weights checked against its configuration.

    Raises:
        InputError: if they do not fit, listing the tensors.
    """
    config, style = read_config(folder / "config.json")
    weights = find_weights(folder, CHECKPOINT)
    _check_depth(folder / "config.json", {"num_layers": config.depth}, weights)
    with torch.device("meta"):
        transformer = WanTransformer(config)
    sources = {name: source_of(name, style) for name, _ in transformer.named_parameters()}
    weights.check(transformer, sources)
    return Expert(config, weights, sources)


def local_folder(name: str, flag: str, parts: Sequence[str]) -> Path:
    """A local folder, or that of a hub id, of which those parts are downloaded if need be.

    Raises:
        InputError: if there is neither, with the command that downloads it.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(flag, f"{name} is no folder; name one, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    command = f"hf download {name} --local-dir {folder.name}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            flag, f"{name} is no local folder; pip install 'meshdiff[wan]', or download it: {command}"
        ) from None
    try:
        # Pickled files and pictures are of no use.
        kinds = ("json", "safetensors", "txt", "model")
        return Path(snapshot_download(name, allow_patterns=[f"{part}.{kind}" for part in parts for kind in kinds]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            flag, f"{name} is no local folder and cannot be downloaded ({reason}); where there is a network: {command}"
        ) from error


def read_json(path: Path, flag: str) -> dict[str, Any]:
    """An object from a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(flag, f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(flag, f"{path} holds no JSON object")
    return content


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST


def _check_depth(path: Path, config: Mapping[str, Any], weights: WeightFiles) -> None:
    """Raise if there are more layers than tensors of weights: making a model of a billion layers would take hours."""
    depth = config.get("num_layers")
    if not _is_size(depth) or depth > len(weights.names):
        raise InputError(weights.flag, f"{path}: num_layers is {depth!r}; the weights are {len(weights.names)} tensors")


def _check_vae(path: Path, config: Mapping[str, Any], flag: str) -> None:
    """Raise unless a VAE's configuration has what is needed after sampling, and fits its own decoder."""

    def wrong(key: str, needed: str) -> InputError:
        return InputError(flag, f"{path}: {key} is {config.get(key)!r}, needs {needed}")

    levels, halves = config.get("dim_mult", [1, 2, 4, 4]), config.get("temperal_downsample", [False, True, True])
    for key, value in (("dim_mult", levels), ("temperal_downsample", halves)):
        if not isinstance(value, list) or not 0 < len(value) < 10:
            raise wrong(key, "a list of a few")
    patch, channels = config.get("patch_size"), config.get("z_dim", 16)
    if patch is not None and not (_is_size(patch) and config.get("out_channels", 3) % patch**2 == 0):
        raise wrong("patch_size", "a whole number whose square divides out_channels, or null")
    strides = {"scale_factor_spatial": 2 ** (len(levels) - 1) * (patch or 1), "scale_factor_temporal": 2 ** sum(halves)}
    for key, stride in strides.items():
        default = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}[key]
        if config.get(key, default) != stride:
            raise wrong(key, f"{stride}, which is what its decoder makes")
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        if not (isinstance(values, list) and len(values) == channels and all(map(_is_number, values))):
            raise wrong(key, f"{channels} numbers")
    if min(config["latents_std"]) <= 0:
        raise wrong("latents_std", "numbers above 0")


def read_scheduler(path: Path, flag: str) -> dict[str, Any]:
    """Settings for UniPC; Wan's own if the file holds those of another scheduler.

    Raises:
        InputError: if they are of another kind of diffusion than Wan's.
    """
    settings = read_json(path, flag)
    if settings.get("_class_name") != "UniPCMultistepScheduler":
        return dict(UNIPC)
    for key in ("prediction_type", "use_flow_sigmas", "num_train_timesteps"):
        if settings.get(key) != UNIPC[key]:
            raise InputError(flag, f"{path}: {key} is {settings.get(key)!r}; Wan's is {UNIPC[key]!r}")
    return settings


def read_config(path: Path) -> tuple[WanConfig, NameStyle]:
    """A transformer's configuration, and the style of the names of its tensors.

    Raises:
        InputError: if it is none of a Wan text-to-video transformer.
    """
    given = read_json(path, CHECKPOINT)

    def wrong(problem: str) -> InputError:
        return InputError(CHECKPOINT, f"{path}: {problem}")

    def size(key: str, default: int | None = None) -> int:
        value: Any = given.get(key, default)
        if not _is_size(value):
            raise wrong(f"{key} is {value!r}, needs a whole number above 0")
        return value

    name = given.get("_class_name")
    if name not in ("WanTransformer3DModel", "WanModel"):
        raise wrong(f"_class_name is {name!r}; this takes WanTransformer3DModel (diffusers) or WanModel (Wan's own)")
    patch = given.get("patch_size", [1, 2, 2])
    if not (isinstance(patch, list) and len(patch) == 3 and all(map(_is_size, patch))):
        raise wrong(f"patch_size is {patch!r}, needs three whole numbers")
    eps = given.get("eps", 1e-6)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise wrong(f"eps is {eps!r}, needs a number between 0 and 1")
    shared = {
        "patch": tuple(patch),
        "ffn_dim": size("ffn_dim"),
        "text_dim": size("text_dim", 4096),
        "frequency_dim": size("freq_dim", 256),
        "depth": size("num_layers"),
        "cross_norm": given.get("cross_attn_norm", True) is not False,
        "eps": eps,
    }
    if name == "WanModel":
        style: NameStyle = "original"
        heads, dim, channels, out = size("num_heads"), size("dim"), size("in_dim"), size("out_dim")
        needs_image = given.get("model_type", "t2v") not in ("t2v", "ti2v")
    else:
        style = "diffusers"
        heads, channels, out = size("num_attention_heads"), size("in_channels"), size("out_channels")
        dim = heads * size("attention_head_dim")
        needs_image = bool(given.get("image_dim") or given.get("added_kv_proj_dim"))
    if needs_image or channels != out:
        raise wrong("an image-to-video transformer; this takes text-to-video ones")
    if dim % (2 * heads) or dim // heads < 6:
        raise wrong(f"{dim} channels on {heads} heads; heads need an even number of channels, 6 at least")
    if shared["frequency_dim"] % 2:
        raise wrong(f"freq_dim is {shared['frequency_dim']}, needs an even number")
    return WanConfig(channels=channels, dim=dim, heads=heads, **shared), style


# Parts of parameters' names: ours, diffusers', Wan's own.
_NAMES: dict[str, tuple[str | tuple[str, ...], str | tuple[str, ...]]] = {
    "patch_embedding": ("patch_embedding", "patch_embedding"),
    "text_mlp.0": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    "text_mlp.2": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    "time_embedding.mlp.0": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    "time_embedding.mlp.2": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    "time_projection.1": ("condition_embedder.time_proj", "time_projection.1"),
    "head.modulation": ("scale_shift_table", "head.modulation"),
    "head.linear": ("proj_out", "head.head"),
    "modulation": ("scale_shift_table", "modulation"),
    "attention.qkv": (("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("self_attn.q", "self_attn.k", "self_attn.v")),
    "attention.norm_query": ("attn1.norm_q", "self_attn.norm_q"),
    "attention.norm_key": ("attn1.norm_k", "self_attn.norm_k"),
    "attention.out": ("attn1.to_out.0", "self_attn.o"),
    "norm_cross": ("norm2", "norm3"),
    "cross_attention.query": ("attn2.to_q", "cross_attn.q"),
    "cross_attention.key_value": (("attn2.to_k", "attn2.to_v"), ("cross_attn.k", "cross_attn.v")),
    "cross_attention.norm_query": ("attn2.norm_q", "cross_attn.norm_q"),
    "cross_attention.norm_key": ("attn2.norm_k", "cross_attn.norm_k"),
    "cross_attention.out": ("attn2.to_out.0", "cross_attn.o"),
    "ffn.0": ("ffn.net.0.proj", "ffn.0"),
    "ffn.2": ("ffn.net.2", "ffn.2"),
}


def source_of(parameter: str, style: NameStyle) -> Source:
    """The tensors that a parameter of `WanTransformer` is made of."""
    match = re.match(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?$", parameter)
    assert match is not None
    block, part, kind = (group or "" for group in match.groups())
    theirs = _NAMES[part][0 if style == "diffusers" else 1]
    names = tuple(f"{block}{name}{kind}" for name in ((theirs,) if isinstance(theirs, str) else theirs))
    return Source(names, _patches_as_tokens) if parameter == "patch_embedding.weight" else Source(names)


def _patches_as_tokens(weight: Tensor) -> Tensor:
    """A convolution `[dim, channels, frames, rows, columns]` as the linear layer of `patchify`'s tokens."""
    return weight.permute(0, 2, 3, 4, 1).flatten(1)
