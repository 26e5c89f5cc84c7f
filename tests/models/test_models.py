from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

from meshdiff import InputError, Layout, Request
from meshdiff.diffusion.sampling import SOLVERS
from meshdiff.models.checkpoint import load_weights
from meshdiff.models.digits import DigitsModel
from meshdiff.models.layers import apply_rope, rope_3d
from meshdiff.models.video_dit import VideoDiT, VideoDiTConfig
from meshdiff.models.wan import patchify, unpatchify
from meshdiff.pipeline import prepare_request


def test_patchify_is_frame_major_and_comes_back():
    video = torch.arange(4 * 16 * 24, dtype=torch.float32).reshape(1, 1, 4, 16, 24)
    tokens = patchify(video, (2, 8, 8))
    assert tokens.shape == (1, 2 * 2 * 3, 128)
    # The first six tokens are the first two frames; the second of them is the next column.
    assert torch.equal(tokens[0, 0].reshape(2, 8, 8), video[0, 0, :2, :8, :8])
    assert torch.equal(tokens[0, 1].reshape(2, 8, 8), video[0, 0, :2, :8, 8:16])
    assert torch.equal(tokens[0, 6].reshape(2, 8, 8), video[0, 0, 2:, :8, :8])
    assert torch.equal(unpatchify(tokens, (2, 2, 3), (2, 8, 8)), video)


@pytest.mark.parametrize("head_dim", [6, 8, 24, 128])
def test_rope_makes_scores_depend_on_relative_position_only(head_dim):
    grid = (4, 5, 6)
    rope = rope_3d(grid, head_dim)
    assert rope[0].shape == (4 * 5 * 6, 1, head_dim // 2)
    query, key = torch.randn(1, 1, 1, head_dim), torch.randn(1, 1, 1, head_dim)
    rotated_query, rotated_key = (apply_rope(t.expand(1, 120, 1, -1), rope)[0, :, 0] for t in (query, key))
    at = lambda f, y, x: (f * 5 + y) * 6 + x  # noqa: E731
    first = rotated_query[at(0, 1, 2)] @ rotated_key[at(1, 3, 3)]
    shifted = rotated_query[at(2, 2, 4)] @ rotated_key[at(3, 4, 5)]
    torch.testing.assert_close(first, shifted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotated_query.norm(dim=-1), query.norm().expand(120), rtol=1e-5, atol=1e-5)


def test_the_model_file_knows_nothing_of_meshes():
    import inspect

    import meshdiff.models.layers as layers
    import meshdiff.models.video_dit as video_dit
    import meshdiff.models.wan as wan

    for module in (layers, video_dit, wan):
        source = inspect.getsource(module)
        assert not any(word in source for word in ("DTensor(", ".dist", "rank", "cp_size", "device_mesh"))


def test_prompts_reach_the_model():
    model = tiny_model()
    request = tiny_model().prepare(Request("a 7 moving left", frames=8))
    words = lambda text: torch.tensor([[0, 11, 20]]) if not text else torch.tensor([[4, 12, 21]])  # noqa: E731
    x, rope = model.noise(request), model.rope(request)
    outputs = [model.transformer(x, torch.ones(1), model.transformer.encode_text(words(t)), rope) for t in ("", "x")]
    assert not torch.equal(*outputs)


def test_weights_are_checked(tmp_path):
    module = torch.nn.Linear(2, 3)
    good = tmp_path / "good.safetensors"
    save_file({"weight": torch.ones(3, 2).half(), "bias": torch.zeros(3).half()}, good)
    load_weights(module, good)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, torch.ones(3, 2))
    with pytest.raises(InputError, match="--weights: no such file: "):
        load_weights(module, tmp_path / "none.safetensors")
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(good.read_bytes()[:-5])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_weights(module, corrupt)
    with pytest.raises(InputError, match="--weights: "):
        load_weights(module, tmp_path / ("x" * 300))
    damaged = tmp_path / "damaged.safetensors"
    save_file({"weight": torch.full((3, 2), float("nan")), "bias": torch.zeros(3)}, damaged)
    with pytest.raises(InputError, match=r"weight in .* not made of finite numbers"):
        load_weights(module, damaged)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(4, 2), "scale": torch.ones(1)}, other)
    with pytest.raises(
        InputError, match=r"missing: bias; unexpected: scale; of another shape: weight \[4, 2\] instead of \[3, 2\]"
    ):
        load_weights(module, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 15}, "--frames: 15 given; this model makes 8, 10, 12, 14, 16"),
        ({"frames": 26}, "--frames: 26 given"),
        ({"height": 36}, "--height: 36 given; this model makes 32, 40, 48"),
        ({"width": 8}, "--width: 8 given"),
        ({"frames": 24, "height": 48, "width": 40}, "--frames: 24 given; on a canvas of 48 x 40 this model makes 18"),
        ({"prompt": "the..."}, "--prompt: 'the...' names neither a digit nor a direction"),
        ({"negative_prompt": "ugly"}, "--negative-prompt: unknown word 'ugly'"),
        ({"solver": "unipc"}, f"--solver: 'unipc' given; this model has {', '.join(SOLVERS)}$"),
    ],
)
def test_requests_beyond_the_model_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        prepare_request(tiny_model(), Request(**{"prompt": "a 7 moving left", **change}), Layout())


def test_more_ranks_than_the_sequence_feeds_are_refused():
    request = Request("a 7 moving left", frames=8)  # 64 tokens
    prepare_request(tiny_model(), request, Layout(1, 64))
    with pytest.raises(InputError, match="--cp: 65 ranks leave some without any of this clip's 64 tokens; use --cp 64"):
        prepare_request(tiny_model(), request, Layout(1, 65))
    with pytest.raises(InputError, match="use --cp 32 or fewer"):
        prepare_request(tiny_model(), request, Layout(1, 50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  "}, "--prompt: is empty"),
        ({"steps": 0}, "--steps: 0 given, needs at least 1"),
        ({"frames": -1}, "--frames: -1 given"),
        ({"guidance_scale": float("nan")}, "--guidance-scale: nan given"),
        ({"shift": 0.0}, "--shift: 0.0 given"),
        ({"seed": -1}, "--seed: -1 given"),
    ],
)
def test_requests_that_make_no_sense_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Request(**{"prompt": "a 7 moving left", **change})


def test_scale_one_runs_one_branch():
    assert Request("a 7 moving left", guidance_scale=1.0).branches == ["a 7 moving left"]
    assert Request("a 7 moving left", negative_prompt="a 3").branches == ["a 7 moving left", "a 3"]


def test_noise_depends_on_the_seed_alone():
    model = DigitsModel(VideoDiT(VideoDiTConfig(depth=1)))
    torch.manual_seed(1)
    first = model.noise(model.prepare(Request("a 7", seed=3)))
    torch.manual_seed(2)
    assert torch.equal(first, model.noise(model.prepare(Request("a 7", seed=3))))
    assert not torch.equal(first, model.noise(model.prepare(Request("a 7", seed=4))))
