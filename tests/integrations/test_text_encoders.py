"""Text encoders of transformers on a mesh: what they encode and write is that of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

from meshdiff import Layout, init_mesh, parallelize
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.integrations.diffusers import writes_text

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
TOKENS = torch.arange(26).view(2, 13)  # that 2 and 3 ranks do not divide
MASK = torch.ones_like(TOKENS)
MASK[1, 9:] = 0


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def clip() -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**SIZES))


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))


def built(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@torch.no_grad()
def encoded() -> list[dict[str, tuple[float, float]]]:
    """Of each encoder, on every rank: the largest error of three calls, and the share of its work on shards."""
    mesh, found = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], {}
    for kind in (llama, clip, t5):
        model = built(kind)
        given = {"input_ids": TOKENS, "attention_mask": MASK, "output_hidden_states": True}
        expected = [*model(**given).hidden_states]
        parallel = parallelize(model, mesh, aside=writes_text)
        errors = [difference([*model(**given).hidden_states], expected) for _ in range(3)]
        found[kind.__name__] = max(errors), parallel.report().sharded_share
    return all_gather_object(found)


@torch.no_grad()
def written() -> list[bool]:
    """On every rank, True if the tokens that follow are those of one device, and no rank has shared any."""
    mesh, model = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], built(llama)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    parallel = parallelize(model, mesh, aside=writes_text)
    found = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    return all_gather_object(torch.equal(found, expected) and not parallel.was_called)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_prompt_is_encoded_as_on_one_device(ranks, tmp_path):
    for found in run_on_ranks(encoded, ranks, tmp_path):
        for name, (error, share) in found.items():
            assert error <= 1e-6, name
            assert share > 0.99, name


def test_text_is_written_by_every_rank(tmp_path):
    assert run_on_ranks(written, 2, tmp_path) == [True, True]
