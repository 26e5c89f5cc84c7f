"""Parts of the pipelines: sizes, random weights, tokenizers and text encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from experiments.tiny_models.wan_checkpoint import WORDS, make_tokenizer, randomize

__all__ = [
    "CHANNELS",
    "LATENTS",
    "LATENTS_IN_AND_OUT",
    "ROTARY",
    "SIZES",
    "TEXT_WIDTH",
    "WIDTH",
    "byte_tokenizer",
    "clip",
    "drawn",
    "drawn_vae",
    "flow_matching",
    "t5",
    "token_ids",
]

SIZES = {"num_attention_heads": 5, "attention_head_dim": 16, "num_layers": 2}
"""Sizes of every transformer: heads that 2 and 3 do not divide, each with channels for three rotary axes."""
WIDTH = 5 * 16
ROTARY = (4, 6, 6)
TEXT_WIDTH = 32
"""Width of every text encoder; two in one pipeline differ."""
CHANNELS = (8, 8, 8, 8)
"""Channels of an autoencoder's blocks; its strides are the real ones."""
LATENTS = 4
LATENTS_IN_AND_OUT = {"in_channels": LATENTS, "out_channels": LATENTS}


def drawn(module: nn.Module) -> Any:
    """The module, for inference, with weights none of which is zero or neutral: fresh ones hide what is computed."""
    randomize(module.eval(), torch.default_generator)
    return module


def drawn_vae(vae: nn.Module, contrast: float = 0.35) -> Any:
    """An autoencoder, its last layer scaled: pixels beyond -1 and 1 would be clamped."""
    drawn(vae)
    last = vae.decoder.proj_out if hasattr(vae.decoder, "proj_out") else vae.decoder.conv_out
    for parameter in last.parameters():
        parameter.data.mul_(contrast)
    return vae


def t5_tokenizer() -> Any:
    """The tokenizer of the tiny Wan, which needs its files only to start."""
    with TemporaryDirectory() as folder:
        return make_tokenizer(Path(folder) / "tokenizer")


def byte_tokenizer(texts: Iterable[str], special: list[str], form: str = "$A", **settings: Any) -> Any:
    """A byte-level tokenizer that has a token for every word of `WORDS` and of `texts`, and spells the others.

    Args:
        texts: what else it must be able to say shortly.
        special: tokens that are no text, in the order of their ids, from 0.
        form: what an encoded text ($A) looks like.
        settings: roles of special tokens and the rest that transformers wants to know.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Every newline by itself: templates are then at least as many tokens as the pipelines cut off.
    words = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    # More than are ever reached: every word of the texts becomes one token.
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS, *texts], trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, pair=f"{form} $B", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def token_ids(tokenizer: Any) -> dict[str, int | None]:
    """The numbers of special tokens for a text model's configuration."""
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


def t5() -> tuple[Any, Any]:
    """A tokenizer and an encoder."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer()
    shape = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer), **shape, feed_forward_proj="gated-gelu")
    encoder = drawn(T5EncoderModel(config))
    encoder.encoder.final_layer_norm.weight.data.mul_(0.5)  # its output has this scale
    return tokenizer, encoder


def clip(width: int, projected: bool = False) -> tuple[Any, Any]:
    """A tokenizer and a text model, with the projection of its summary or without."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    start, end = "<|startoftext|>", "<|endoftext|>"
    roles = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    tokenizer = byte_tokenizer([], [start, end], f"{start} $A {end}", model_max_length=77, **roles)
    shape = {"hidden_size": width, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=width, **shape, **token_ids(tokenizer))
    return tokenizer, drawn(CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config))


def flow_matching(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)
