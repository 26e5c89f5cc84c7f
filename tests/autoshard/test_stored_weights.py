"""Weights of others' models, stored in parts or in host memory: the same bits, 1/N of the bytes, one gather a block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import run_on_every_rank
from tiny import alone
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import T5Config, T5EncoderModel
from weight_kinds import CHANNELS, Model

from experiments.tiny_models.transformers import TINY
from meshdiff import CommsCounter, Layout, init_mesh, parallelize, simulate
from meshdiff.autoshard.stored_weights import StoredWeights
from meshdiff.distributed import weight_streaming
from meshdiff.distributed.mesh import ranks_of_replica
from meshdiff.distributed.simulation import on_each_rank, outside, unwrap
from meshdiff.distributed.weight_streaming import ALIGNMENT, Storage
from meshdiff.integrations.diffusers import parallelize as parallelize_diffusers

CPU = torch.device("cpu")
TOKENS = torch.randn(1, 7, CHANNELS, generator=torch.Generator().manual_seed(0))


def called(module: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [unwrap(leaf) for leaf in tree_leaves(module(**arguments)) if isinstance(leaf, Tensor)]


def text_encoder() -> nn.Module:
    config = T5Config(vocab_size=99, d_model=24, d_kv=6, d_ff=37, num_layers=3, num_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5EncoderModel(config).eval()


@pytest.mark.parametrize(
    ("name", "layout", "on_host"),
    [
        ("FluxTransformer2DModel", Layout(1, 3), False),
        ("WanTransformer3DModel", Layout(2, 2), True),
        ("text encoder", Layout(1, 3), True),
        ("text encoder", Layout(2, 2), False),
    ],
    ids=str,
)
def test_a_rank_stores_its_part_and_the_bits_stay(name, layout, on_host):
    if name == "text encoder":
        module, arguments = text_encoder(), {"input_ids": torch.arange(12).view(2, 6)}
    else:
        module, arguments = TINY[name].build(), {**TINY[name].arguments(), "return_dict": False}
    plain = copy.deepcopy(module)
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    number = len([*module.parameters()])
    with simulate(layout.world_size):
        mesh = init_mesh(layout, "cpu")
        if name != "text encoder":
            parallelize(plain, mesh["cp"])
            parallelize(module, mesh["cp"])
        with outside():
            arguments = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
        expected = called(plain, arguments)
        stored = StoredWeights(module, Storage(CPU, divided=ranks_of_replica(mesh), on_host=on_host))
        assert stored.nbytes == nbytes
        assert stored.resident_bytes < 0.05 * nbytes
        part = (nbytes - stored.resident_bytes) / layout.world_size
        assert part <= stored.stored_bytes <= part + 2 * ALIGNMENT * number
        for _ in range(2):
            assert all(torch.equal(*pair) for pair in zip(called(module, arguments), expected, strict=True))
        assert f"divided between {layout.world_size} ranks" in str(stored)
        assert "read outside" not in str(stored)


def test_host_memory_alone_needs_no_ranks():
    module = Model()
    expected = called(module, {"tokens": TOKENS})
    stored = StoredWeights(module, Storage(CPU, on_host=True))
    assert torch.equal(called(module, {"tokens": TOKENS})[0], expected[0])
    assert stored.stored_bytes >= stored.nbytes - stored.resident_bytes > 0
    assert "in host memory" in str(stored)


def gathers_of_ranks() -> dict[str, Any]:
    """The traffic of a call on real ranks or simulated ones, and the sizes of the parts that it fetches."""
    with outside():
        module, tokens = Model(), TOKENS.clone()
    mesh = init_mesh(Layout(1, torch.distributed.get_world_size()), "cpu")
    stored = StoredWeights(module, Storage(CPU, divided=ranks_of_replica(mesh)))
    with CommsCounter(stored._storage.divided) as comms:
        output = called(module, {"tokens": tokens})
    return {"sent": comms.as_dict(), "stored": [weights.stored_bytes for weights in stored._weights], "output": output}


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_call_gathers_each_block_once_and_nothing_else(ranks, tmp_path):
    with simulate(ranks):
        simulated = gathers_of_ranks()
    for of_rank in [simulated, *run_on_every_rank(gathers_of_ranks, ranks, tmp_path)]:
        assert len(of_rank["stored"]) == 3  # two blocks and the head
        (of_dim,) = of_rank["sent"].values()
        assert of_dim == {"all_gather": {"count": 3, "bytes": sum(of_rank["stored"]) * (ranks - 1)}}
        assert torch.equal(of_rank["output"][0], called(Model(), {"tokens": TOKENS})[0])


def test_the_output_is_wrong_when_one_rank_stores_something_else(monkeypatch):
    store = weight_streaming._stored_part

    @on_each_rank
    def damage(shard: Tensor, rank: int) -> Tensor:
        return shard ^ 1 if rank == 1 else shard

    def store_badly(*parameters: Any) -> Tensor:
        storage = parameters[-1]
        return damage(store(*parameters), storage.divided.get_local_rank())

    monkeypatch.setattr(weight_streaming, "_stored_part", store_badly)
    with simulate(3):
        damaged = gathers_of_ranks()["output"][0]
    assert not torch.equal(damaged, called(Model(), {"tokens": TOKENS})[0])


def test_the_weights_of_the_next_block_are_on_their_way_from_the_second_call_on():
    module, seen = Model(), []
    stored = StoredWeights(module, Storage(CPU, on_host=True))
    for block in module.blocks:
        block.use = lambda block, made: seen.append([w._coming is not None for w in stored._weights]) or made
    for _ in range(2):
        called(module, {"tokens": TOKENS})
    nothing, second, third = [False] * 3, [False, True, False], [False, False, True]
    assert seen == [nothing, nothing, second, third]
    assert [weights._coming for weights in stored._weights] == [None] * 3


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_weight_that_is_read_elsewhere_is_fetched_for_it(ranks):
    class Reading(Model):
        def forward(self, tokens: Tensor) -> tuple[Tensor]:
            (made,) = super().forward(tokens)
            return (nn.functional.linear(made, self.blocks[0].attn_out.weight) * self.head.weight[0],)

    module = Reading()
    expected = called(module, {"tokens": TOKENS})[0]
    with simulate(ranks) if ranks > 1 else alone():
        mesh = init_mesh(Layout(1, ranks), "cpu")
        parallelize(module, mesh["cp"])
        stored = StoredWeights(module, Storage(CPU, divided=ranks_of_replica(mesh)))
        with outside():
            tokens = TOKENS.clone()
        torch.testing.assert_close(called(module, {"tokens": tokens})[0], expected)
        assert "times one was read outside of its module" in str(stored)


class Layouts(nn.Module):
    """Weights with gaps between values, in another order, of no dim, of no values, and of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(5, 7).t())
        self.last = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.gaps = nn.Parameter(torch.randn(7, 10)[:, ::2])
        self.expanded = nn.Parameter(torch.randn(1, 5).expand(7, 5))
        self.one = nn.Parameter(torch.tensor(3.0))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.as_half = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.as_double = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.integers = nn.Parameter(torch.arange(5), requires_grad=False)

    def forward(self) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        return {name: (value.clone(), value.stride()) for name, value in self.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 3])
def test_weights_come_back_in_their_layout(ranks):
    torch.manual_seed(0)
    module = Layouts()
    expected = module()
    with simulate(ranks) if ranks > 1 else alone():
        mesh = init_mesh(Layout(1, ranks), "cpu")
        holder = nn.Sequential(module).requires_grad_(False)
        stored = StoredWeights(holder, Storage(CPU, divided=ranks_of_replica(mesh), on_host=True), ["0"])
        assert stored.resident_bytes == 0
        for name, (value, stride) in holder[0]().items():
            assert torch.equal(unwrap(value), expected[name][0]), name
            assert stride == expected[name][1] or name in ("gaps", "expanded"), name


def test_a_weight_that_modules_share_is_stored_once():
    module = Model()
    module.blocks[1].to_qkv.weight = module.blocks[0].to_qkv.weight
    module.head.weight = module.blocks[1].attn_out.weight
    expected = called(module, {"tokens": TOKENS})[0]
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    stored = StoredWeights(module, Storage(CPU, on_host=True))
    assert stored.nbytes == nbytes
    for _ in range(2):
        assert torch.equal(called(module, {"tokens": TOKENS})[0], expected)
    stored.remove()
    assert module.blocks[1].to_qkv.weight is module.blocks[0].to_qkv.weight
    assert module.head.weight is module.blocks[1].attn_out.weight


class TwoWays(Model):
    """Other blocks for other inputs, as some models skip blocks at some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.extend(Model().blocks)
        for number, block in enumerate(self.blocks):
            nn.init.constant_(block.attn_out.bias, number)

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        for block in self.blocks[:2] if tokens.mean() > 0 else self.blocks[2:]:
            tokens = block(tokens)
        return (self.head(tokens),)


def apart_of_branches(how: str) -> tuple[float, dict[str, str]]:
    """The largest error of two branches that need other blocks, and why their calls are not divided."""
    module, plain = TwoWays(), TwoWays()
    mesh = init_mesh(Layout(cfg=2), "cpu")
    if how == "pipelines":
        parallel = parallelize_diffusers(module, mesh, shard_weights=True)
    else:
        parallel = parallelize_diffusers(module, mesh)
        parallelize(module, mesh["cp"], shard_weights=mesh)
    errors = []
    with torch.no_grad():
        for _ in range(4):
            given = [TOKENS.abs(), -TOKENS.abs()]
            outputs = [module(tokens)[0] for tokens in given]
            errors += [(out - plain(x)[0]).abs().max().item() for out, x in zip(outputs, given, strict=True)]
    return max(errors), parallel.fallbacks()


@pytest.mark.parametrize(("how", "reason"), [("pipelines", ""), ("by hand", "has weights that ranks of cfg gather")])
def test_branches_that_need_other_blocks_never_gather_together(how, reason, tmp_path):
    for error, fallbacks in run_on_every_rank(apart_of_branches, 2, tmp_path, how):
        assert error < 1e-5
        assert fallbacks.get("TwoWays", "").startswith(reason)
        assert bool(fallbacks) == bool(reason)


def of_parent() -> Model:
    """A model that uses a weight of its blocks itself."""

    class Parent(Model):
        def forward(self, tokens: Tensor) -> tuple[Tensor]:
            return (super().forward(tokens)[0] * self.scale.sum(),)

    module = Parent()
    module.scale = nn.Parameter(torch.ones(CHANNELS))
    for block in module.blocks:
        block.scale = module.scale
        block.use = lambda block, made: made * block.scale.mean()
    return module


def of_list() -> Model:
    """A model that keeps a weight in a list as well."""
    module = Model()
    block = module.blocks[0]
    held = [block.attn_out.weight]
    block.use = lambda block, made: made + held[0].sum()
    return module


@pytest.mark.parametrize("make", [of_parent, of_list])
def test_a_weight_that_something_else_refers_to_keeps_its_values(make):
    module = make()
    expected = called(module, {"tokens": TOKENS})[0]
    StoredWeights(module, Storage(CPU, on_host=True))
    assert torch.equal(called(module, {"tokens": TOKENS})[0], expected)
