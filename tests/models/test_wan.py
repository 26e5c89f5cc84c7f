"""Wan on the mesh against diffusers on one device."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contract import of_rank
from ranks import run_on_every_rank
from tiny import alone
from tiny_wan import LEVELS, REQUEST, TOKENS, by_diffusers, checkpoint, make, request, traffic

from experiments.tiny_models.wan_checkpoint import Config, write
from meshdiff import InputError, Layout, Request, explain_strategy, init_mesh, place, simulate
from meshdiff.diffusion.sampling import SOLVERS
from meshdiff.distributed.mesh import replicate_module
from meshdiff.distributed.placements import POSITIONS, REPLICATED, SEQUENCE
from meshdiff.distributed.simulation import rank_values, unwrap
from meshdiff.models import WanModel, WanOptions
from meshdiff.models.layers import rope_3d
from meshdiff.models.wan import WanConfig, WanTransformer, patchify, unpatchify
from meshdiff.pipeline import prepare_request

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    for version in ("2.1", "2.2"):
        checkpoint(folder, version)
    return folder


@pytest.fixture(scope="module")
def references(root) -> dict[str, torch.Tensor]:
    return {version: by_diffusers(root, version) for version in ("2.1", "2.2")}


@pytest.fixture(scope="module")
def one_process(root) -> dict[str, torch.Tensor]:
    with alone():
        mesh = init_mesh(Layout(), "cpu")
        return {version: make(root, mesh, version)[0] for version in ("2.1", "2.2")}


def filled(model: WanModel, expert: int = 0) -> WanTransformer:
    transformer = model.transformers[expert]
    model.fill(expert, [name for name, _ in transformer.named_parameters()], CPU, torch.float32)
    return transformer


@torch.no_grad()
def compare(folder: Path, grid: tuple[int, int, int], part: str = "transformer") -> float:
    """The relative error of our transformer against diffusers', over times and two prompts."""
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(folder / part)
    model = WanModel.open(str(folder))
    ours = filled(model, expert=0 if part == "transformer" else 1)
    frames, rows, columns = grid
    latents, text = torch.randn(2, 16, frames, 2 * rows, 2 * columns), torch.randn(2, 512, model.config.text_dim)
    errors = []
    for time in (999, 500, 3):
        expected = theirs(latents, torch.tensor([time, time]), text).sample
        context, rope = ours.encode_text(text), rope_3d(grid, model.config.head_dim)
        tokens = ours(patchify(latents, (1, 2, 2)), torch.tensor([float(time)]), context, rope)
        errors.append((unpatchify(tokens, grid, (1, 2, 2)) - expected).norm() / expected.norm())
    return float(max(errors))


def test_transformer_equals_diffusers(root, tmp_path):
    torch.manual_seed(0)
    assert compare(checkpoint(root, "2.2") / "diffusers", (3, 4, 6)) < 1e-5
    assert compare(checkpoint(root, "2.2") / "diffusers", (3, 4, 6), "transformer_2") < 1e-5
    write(Config(out=tmp_path / "wan", heads=3, head_dim=22, layers=3, ffn_dim=50, text_dim=20, shards=1, seed=1))
    assert compare(tmp_path / "wan" / "diffusers", (5, 1, 7)) < 1e-5


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_both_layouts_hold_the_same_weights(root, version):
    folder = checkpoint(root, version)
    diffusers = WanModel.open(str(folder / "diffusers"))
    original = WanModel.open(str(folder / "original"), components=str(folder / "diffusers"))
    assert len(diffusers.transformers) == len(original.transformers) == (1 if version == "2.1" else 2)
    assert diffusers.checkpoint.boundary == original.checkpoint.boundary
    for expert in range(len(diffusers.transformers)):
        one, other = filled(diffusers, expert).state_dict(), filled(original, expert).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)
    if version == "2.2":
        assert not torch.equal(*(diffusers.transformers[i].head.linear.weight for i in (0, 1)))


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_whole_pipeline_equals_diffusers(references, one_process, version):
    torch.testing.assert_close(one_process[version], references[version], rtol=0, atol=1e-4)
    assert references[version].std() > 0.1


def test_experts_share_a_run(root, references):
    model = WanModel.open(str(checkpoint(root, "2.2") / "diffusers"))
    times, _ = model.schedule(replace(request("2.2"), shift=3.0))
    assert {model.expert(time) for time in times} == {0, 1}
    assert (model.expert(0.875), model.expert(0.8749)) == (0, 1)
    assert not torch.allclose(references["2.1"], references["2.2"], atol=1e-2)


def on_this_rank(root: Path) -> dict[tuple[str, str], tuple[torch.Tensor, dict, list[int]]]:
    """The clip, traffic and counts, of both versions and of places for weights."""
    world = dist.get_world_size()
    layout = Layout(2, world // 2) if world % 2 == 0 else Layout(1, world)
    runs = [("2.1", "plain"), ("2.1", "sharded"), ("2.1", "offloaded"), ("2.2", "plain")]
    mesh = init_mesh(layout, "cpu")  # one for all runs: an equal one would send on the groups of the first
    return {run: make(root, mesh, *run) for run in runs}


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(1, 3)], ids=str)
def test_real_ranks_give_the_clip_of_one_process_wherever_weights_lie(root, references, one_process, layout, tmp_path):
    of_ranks = run_on_every_rank(on_this_rank, layout.world_size, tmp_path, root)
    model = WanModel.open(str(checkpoint(root) / "diffusers"))
    depth = model.config.depth
    for rank, runs in enumerate(of_ranks):
        for (version, level), (video, sent, (encoded, projected)) in runs.items():
            sharded = LEVELS[level].get("shard_weights", False)
            torch.testing.assert_close(video, references[version], rtol=0, atol=1e-4)
            assert torch.equal(video, one_process[version])
            assert encoded == (rank == 0)
            assert projected == depth * (1 if version == "2.1" else 2)
            if version == "2.1":
                expected, batch = traffic(model, layout, sharded), 2 // layout.cfg
                assert sent == of_rank(expected, layout, model.config, TOKENS, REQUEST.steps, batch, rank)


def test_simulated_ranks_give_the_clip_and_keep_the_contract(root, one_process):
    with simulate(4):
        video, sent, _ = make(root, init_mesh(Layout(2, 2), "cpu"), level="both")
    assert torch.equal(video, one_process["2.1"])
    model = WanModel.open(str(checkpoint(root) / "diffusers"))
    assert sent == traffic(model, Layout(2, 2), sharded=True, real=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 80}, r"--frames: 80 given; this model makes 4 n \+ 1, for instance 77 or 81"),
        ({"frames": 2}, r"--frames: 2 given; this model makes 4 n \+ 1, for instance 1 or 5"),
        ({"height": 100}, "--height: 100 given; this model makes multiples of 16, for instance 96 or 112"),
        ({"width": 8}, "--width: 8 given; this model makes multiples of 16, for instance 16"),
        ({"solver": "none"}, f"--solver: 'none' given; this model has unipc, {', '.join(SOLVERS)}$"),
        ({"options": WanOptions(guidance_scale_2=3.0)}, "--guidance-scale-2: this checkpoint has one transformer"),
    ],
)
def test_requests_that_do_not_fit_are_refused(root, change, message):
    model = WanModel.open(str(checkpoint(root) / "diffusers"))
    with pytest.raises(InputError, match=message):
        prepare_request(model, replace(REQUEST, **change), Layout())


def test_shift_follows_the_resolution(root):
    model = WanModel.open(str(checkpoint(root) / "diffusers"))
    assert model.prepare(Request("a cat")).shift == 3.0
    assert model.prepare(Request("a cat", height=832, width=480)).shift == 3.0
    assert model.prepare(Request("a cat", height=720, width=1280)).shift == 5.0
    assert model.prepare(Request("a cat", height=720, width=1280, shift=8.0)).shift == 8.0
    assert model.grid(model.prepare(Request("a cat"))) == (21, 30, 52)
    assert model.grid(model.prepare(Request("a cat", height=720, width=1280))) == (21, 45, 80)


def by_key_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Stands in for a kernel, for which 75,600 tokens take minutes: the query has no say in what is seen."""
    return attend_to_block(query, key, value)[0]


def attend_to_block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args) -> tuple:
    logits = key.sum(-1, keepdim=True)  # [batch, heads, keys, 1]
    seen = (logits.softmax(2) * value).sum(2, keepdim=True)
    return seen + 0.1 * query, logits.logsumexp((2, 3))[..., None].expand(query.shape[:3])


@pytest.mark.parametrize(("height", "width", "tokens"), [(480, 832, 32_760), (720, 1280, 75_600)])
@pytest.mark.parametrize(("cp", "strategy"), [(4, "ulysses"), (8, "hybrid")])
def test_real_geometries_are_divided_rightly_and_evenly(root, monkeypatch, height, width, tokens, cp, strategy):
    """81 frames are 21 latent frames, which 4 and 8 ranks do not divide, and 8 ranks do not divide 12 heads."""
    model = WanModel.open(str(checkpoint(root) / "diffusers"))
    grid = model.grid(model.prepare(Request("a cat", height=height, width=width)))
    assert grid[0] == 21
    assert math.prod(grid) == tokens
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_key_alone)
    monkeypatch.setattr("meshdiff.attention.ring.attend_block", attend_to_block)
    torch.manual_seed(0)
    config = WanConfig(dim=72, heads=12, depth=1, ffn_dim=32, text_dim=16)
    transformer = WanTransformer(config).requires_grad_(False)
    x, text, time = torch.randn(1, tokens, config.patch_dim), torch.randn(1, 8, 16), torch.tensor([700.0])
    rope = rope_3d(grid, config.head_dim)
    expected = transformer(x, time, transformer.encode_text(text), rope)
    with simulate(cp):
        mesh = init_mesh(Layout(1, cp), "cpu")["cp"]
        replicate_module(transformer, mesh)
        context = transformer.encode_text(place(text, mesh, [REPLICATED]))
        tables = tuple(place(table, mesh, [POSITIONS]) for table in rope)
        tokens_of_ranks = place(x, mesh, [SEQUENCE])
        query = place(torch.empty(1, tokens, 12, 6), mesh, [SEQUENCE])
        assert explain_strategy(query, query, query).strategy == strategy
        shards = {len(shard[0]) for shard in rank_values(tokens_of_ranks.to_local())}
        assert max(shards) - min(shards) <= 1
        velocity = unwrap(transformer(tokens_of_ranks, place(time, mesh, [REPLICATED]), context, tables).full_tensor())
    assert (velocity - expected).norm() / expected.norm() < 1e-5
