"""Write a tiny Wan text-to-video checkpoint of random weights: complete, a few megabytes, the same bytes every time.

It stands in for the real weights, in tests and to try the program: same files, same layers, no meaning.

    python -m experiments.tiny_models.wan_checkpoint --out tiny-wan                    # Wan 2.1
    python -m experiments.tiny_models.wan_checkpoint --out tiny-wan --version 2.2      # two experts

OUT/diffusers/ is what `diffusers.WanPipeline` loads; OUT/original/ holds the same transformer as
the Wan authors name and lay it out, for 2.2 in high_noise_model/ and low_noise_model/.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from meshdiff.cli.output import output_folder
from meshdiff.errors import InputError

WORDS = (
    "a an the and of on in with at to from over through is it its two one small big old young red green blue white "
    "black cat dog bird horse man woman child person car train boat tree grass flower river sea sky sun rain snow "
    "city street house room table walking running sitting flying playing looking moving slowly camera light water"
)
"""Tokens of their own; everything else is spelled."""

LETTERS = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x100))]
"""ASCII and Latin-1, all that is printed and no blank."""

WEIGHTS = "diffusion_pytorch_model"
"""Name of the transformer's file of weights in both layouts."""

# module of the diffusers layout -> module of the authors' layout
OUTSIDE_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
IN_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
IN_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in IN_ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in IN_ATTENTION.items()},
    # The norm before cross-attention: the authors number it after that of the feed-forward layer.
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


@dataclass(frozen=True)
class Config:
    """Write a tiny random Wan checkpoint."""

    out: Path
    """Folder to write; must be empty or not exist."""
    version: Literal["2.1", "2.2"] = "2.1"
    """2.1 has one transformer; 2.2 has two, one for high noise and one for low."""
    heads: int = 4
    """Attention heads of the transformer."""
    head_dim: int = 12
    """Width of a head: even, and at least 6, so that rotary positions have all three axes."""
    layers: int = 2
    """Blocks of the transformer."""
    ffn_dim: int = 64
    """Width inside the transformer's feed-forward layers."""
    text_dim: int = 32
    """Width of the text embedding."""
    shards: int = 2
    """Files that the weights of a transformer are split into."""
    seed: int = 0
    """Seed of all weights."""

    def check(self) -> None:
        """Raise `InputError` for sizes that no Wan can have."""
        for name in ("heads", "layers", "ffn_dim", "text_dim", "shards"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}", f"{getattr(self, name)} given, needs at least 1")
        if self.head_dim < 6 or self.head_dim % 2:
            raise InputError("--head-dim", f"{self.head_dim} given, needs an even number from 6 up")


def silence_libraries() -> None:
    """Import diffusers and transformers, which are optional, and keep them from talking."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise InputError("make_tiny_wan.py", f'needs {error.name}; pip install "meshdiff[wan]"') from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def make_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer that knows a few words and all letters, left in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoTokenizer

    # Scores are log-likelihoods: a word is always likelier than its letters.
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [("▁", -4.0), *((f"▁{word}", -6.0) for word in WORDS.split()), *((letter, -9.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram([*special, *pieces], unk_id=2, byte_fallback=False))
    spaces = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.Metaspace(**spaces)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    # Said here, or HF_HUB_OFFLINE would show in the tokenizer that the pipeline saves.
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter random values at which activations stay of order one and nothing is zero or neutral."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        owner, _, leaf = name.rpartition(".")
        if leaf == "gamma" or (leaf == "weight" and parameter.ndim == 1):  # norms
            value = 1 + 0.2 * noise
        elif leaf == "bias":
            value = 0.2 * noise
        elif leaf == "scale_shift_table":
            value = 0.5 * noise
        elif owner.endswith(("shared", "relative_attention_bias")):  # embeddings
            value = noise
        else:
            value = noise / math.sqrt(parameter[0].numel())
        parameter.copy_(value)


def make_text_encoder(vocabulary: int, config: Config, generator: torch.Generator) -> nn.Module:
    """A UMT5 encoder of two blocks."""
    from transformers import UMT5Config, UMT5EncoderModel

    shape = UMT5Config(vocab_size=vocabulary, d_model=config.text_dim, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    encoder = UMT5EncoderModel(shape).eval()
    randomize(encoder, generator)
    encoder.encoder.final_layer_norm.weight.data.mul_(0.5)  # its output has this scale
    return encoder


def make_vae(generator: torch.Generator) -> nn.Module:
    """Wan's autoencoder with few channels; strides and latent statistics are the real ones."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2]).eval()
    randomize(vae, generator)
    vae.decoder.conv_out.weight.data.mul_(0.35)  # pixels beyond -1 and 1 would be clamped
    return vae


def make_transformer(config: Config, generator: torch.Generator) -> nn.Module:
    """A transformer that listens to its text."""
    from diffusers import WanTransformer3DModel

    heads = {"num_attention_heads": config.heads, "attention_head_dim": config.head_dim}
    widths = {"text_dim": config.text_dim, "ffn_dim": config.ffn_dim}
    transformer = WanTransformer3DModel(**heads, **widths, num_layers=config.layers).eval()
    randomize(transformer, generator)
    # A prompt is a dozen tokens among 512, the rest padding; attention spread evenly would hardly see it.
    for block in transformer.blocks:
        block.attn2.norm_k.weight.data.mul_(3)
    return transformer


def make_pipeline(config: Config, folder: Path) -> Any:
    """All parts together; `folder` keeps the tokenizer's files."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    generator = torch.Generator().manual_seed(config.seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    experts = config.version == "2.2"
    # The models' constructors draw from the global generator, for values that are then replaced.
    with torch.random.fork_rng(devices=[]):
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=make_text_encoder(len(tokenizer), config, generator),
            vae=make_vae(generator),
            # Everything else that Wan ships is this class's default.
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
            ),
            transformer=make_transformer(config, generator),
            transformer_2=make_transformer(config, generator) if experts else None,
            boundary_ratio=0.875 if experts else None,
        )


def original_name(name: str) -> str:
    """The name in the Wan authors' layout of a tensor of the diffusers layout."""
    module, _, leaf = name.rpartition(".")
    if leaf == "scale_shift_table":
        return f"{module or 'head'}.modulation"
    if module.startswith("blocks."):
        _, number, rest = module.split(".", 2)
        return f"blocks.{number}.{IN_BLOCK[rest]}.{leaf}"
    return f"{OUTSIDE_BLOCKS[module]}.{leaf}"


def original_config(transformer: Any) -> dict[str, Any]:
    """The authors' config.json; they leave out what their constructor has as default."""
    import diffusers

    ours = transformer.config
    text = {} if ours.text_dim == 4096 else {"text_dim": ours.text_dim}
    return {
        "_class_name": "WanModel",
        "_diffusers_version": diffusers.__version__,
        "dim": ours.num_attention_heads * ours.attention_head_dim,
        "eps": ours.eps,
        "ffn_dim": ours.ffn_dim,
        "freq_dim": ours.freq_dim,
        "in_dim": ours.in_channels,
        "model_type": "t2v",
        "num_heads": ours.num_attention_heads,
        "num_layers": ours.num_layers,
        "out_dim": ours.out_channels,
        "text_len": 512,
        **text,
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(tensors: dict[str, Tensor], folder: Path, shards: int) -> None:
    """Write one file, or as many as `shards` and the index that lists the file of each tensor."""
    if shards == 1:
        save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    if shards > len(names):
        raise InputError("--shards", f"{shards} given, but there are {len(names)} tensors; give {len(names)} or fewer")
    where = {}
    for i in range(shards):
        file = f"{WEIGHTS}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json({"metadata": {"total_size": total}, "weight_map": where}, folder / f"{WEIGHTS}.safetensors.index.json")


def write(config: Config) -> None:
    """Write both layouts into `config.out`, which appears when they are complete.

    Raises:
        InputError: if sizes cannot work, the folder is not free, or a library is missing.
    """
    config.check()
    silence_libraries()
    parts = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    if config.version == "2.1":
        parts = {"transformer": ""}
    with output_folder(config.out) as folder:
        pipeline = make_pipeline(config, folder / "diffusers")
        pipeline.save_pretrained(folder / "diffusers")
        for part, name in parts.items():
            transformer = getattr(pipeline, part)
            tensors = transformer.state_dict()
            # diffusers splits by size, which gives no exact number of files.
            (folder / "diffusers" / part / f"{WEIGHTS}.safetensors").unlink()
            write_weights(tensors, folder / "diffusers" / part, config.shards)
            original = folder / "original" / name
            original.mkdir(parents=True)
            write_json(original_config(transformer), original / "config.json")
            write_weights({original_name(key): tensor for key, tensor in tensors.items()}, original, config.shards)


def main() -> int:
    """Parse, write, say what to do next; returns the exit code."""
    config = tyro.cli(Config, description=__doc__)
    try:
        write(config)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for layout in ("diffusers", "original"):
        folder = config.out / layout
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB")
    checkpoint = shlex.quote(str(config.out / "diffusers"))
    print(
        f"try it: python experiments/run.py --model wan --checkpoint {checkpoint} "
        '--prompt "A cat walking on grass." --frames 5 --height 64 --width 96 --steps 4'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
