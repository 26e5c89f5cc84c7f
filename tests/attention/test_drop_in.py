"""Mesh attention in models that were not written for it."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import on_ranks
import pytest
import torch
import torch.nn.functional as F
from plain_model import PlainViT, chunk, on_all_ways
from ranks import run_on_ranks
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from meshdiff import ContextParallel, Layout, init_mesh, sharded_attention, simulate
from meshdiff.distributed.simulation import rank_values, unwrap


def on_one_device(model, x, text):
    x = x.clone().requires_grad_()
    output = model(x, text)
    output.square().sum().backward()
    return output.detach(), x.grad


def check(outcomes, model, x, text):
    output, gradient = on_one_device(model, x, text)
    for way, (value, of_x) in outcomes.items():
        torch.testing.assert_close(value, output, rtol=0, atol=1e-6, msg=way)
        torch.testing.assert_close(of_x, gradient, rtol=1e-5, atol=1e-5, msg=way)


def test_an_untouched_model_is_itself_on_real_ranks(tmp_path):
    check(run_on_ranks(on_ranks.drop_in, 3, tmp_path), *PlainViT.example())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_untouched_model_is_itself_on_simulated_ranks(ranks):
    model, x, text = PlainViT.example()
    with simulate(ranks):
        mesh = init_mesh(Layout(1, ranks), "cpu")["cp"]
        outcomes = on_all_ways(mesh, gather=lambda shard: torch.cat(rank_values(shard), dim=1), whole=unwrap)
    check(outcomes, model, x, text)


def test_what_cannot_be_told_is_an_error():
    q, short, text = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4)
    with simulate(2):
        cp = init_mesh(Layout(1, 2), "cpu")["cp"]
        with pytest.raises(ValueError, match="mesh and seq_len together"):
            sharded_attention(cp)
        with pytest.raises(ValueError, match="whole sequence of 8 tokens could be taken for a shard"):
            sharded_attention(cp, seq_len=16, whole=[8])
        with sharded_attention(cp, seq_len=16, whole=[7]):
            F.scaled_dot_product_attention(q, text, text)
            F.scaled_dot_product_attention(text, text, text)
            with pytest.raises(ValueError, match=r"5 to 5 tokens: neither a shard of seq_len=16"):
                F.scaled_dot_product_attention(short, short, short)
            with pytest.raises(ValueError, match=r"8 to 5 tokens"):
                F.scaled_dot_product_attention(q, short, short)
            with pytest.raises(ValueError, match=r"dropout_p=0\.5"):
                F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
            with pytest.raises(ValueError, match="enable_gqa"):
                F.scaled_dot_product_attention(q, q[:, :1], q[:, :1])
        with sharded_attention(cp, seq_len=16), pytest.raises(ValueError, match="MultiheadAttention"):
            torch.nn.MultiheadAttention(8, 2, batch_first=True)(q[0], q[0], q[0], need_weights=False)
        unchanged = F.scaled_dot_product_attention(short, short, short)
        assert unchanged.shape == short.shape


def test_a_style_takes_keywords_and_whole_texts():
    model, x, text = PlainViT.example()
    whole = ContextParallel(input_layouts=Replicate(), output_layouts=Replicate())
    with simulate(3), torch.no_grad():
        cp = init_mesh(Layout(1, 3), "cpu")["cp"]
        cross = parallelize_module(copy.deepcopy(model.blocks[0].cross), cp, whole)
        output = unwrap(cross(x=x, text=text))
    with torch.no_grad():
        torch.testing.assert_close(output, model.blocks[0].cross(x, text), rtol=0, atol=1e-6)


def test_what_is_recomputed_needs_the_context_as_well():
    attention, (_, x, _) = PlainViT().blocks[0].attn, PlainViT.example()
    with simulate(2):
        cp = init_mesh(Layout(1, 2), "cpu")["cp"]
        gradients = []

        def contexts():
            return nullcontext(), sharded_attention(cp, seq_len=29)

        for recompute in (False, True):
            shard = chunk(x, 2, cp.get_local_rank()).requires_grad_()
            with sharded_attention(cp, seq_len=29):
                if recompute:
                    output = checkpoint(attention, shard, use_reentrant=False, context_fn=contexts)
                else:
                    output = attention(shard)
            output.square().sum().backward()
            gradients.append(torch.cat(rank_values(shard.grad), dim=1))
    assert torch.equal(*gradients)


def test_the_style_says_what_it_needs():
    assert "seq_len=None" in repr(ContextParallel())
    with pytest.raises(ValueError, match="input_layouts="):
        ContextParallel(input_layouts=Shard(0))
    model, x, text = PlainViT.example()
    with simulate(2):
        cp = init_mesh(Layout(1, 2), "cpu")["cp"]
        unaware = parallelize_module(copy.deepcopy(model), cp, {"blocks.*.attn": ContextParallel()})
        with pytest.raises(ValueError, match="seq_len="):
            unaware(x, text)
        short = parallelize_module(copy.deepcopy(model), cp, {"blocks.*.attn": ContextParallel(seq_len=29)})
        with pytest.raises(ValueError, match=r"rank 0 was given 14 of seq_len=29 tokens; .* its part is 15"):
            short(x[:, :14], text)
        with pytest.raises(ValueError, match="weights are on a mesh already"):
            parallelize_module(unaware, cp, {"blocks.*.attn": ContextParallel(output_layouts=Replicate())})
