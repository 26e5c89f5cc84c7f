"""Models that others wrote, on a mesh: the same numbers, mostly on shards, or one clear error."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import untouched_cases
from contract import attention_bytes
from ranks import run_on_ranks
from torch.distributed.tensor import DTensor
from untouched_cases import CHANNELS, Model, inputs, of_diffusers, values

import meshdiff.autoshard.lazy
from meshdiff import CommsCounter, Layout, init_mesh, parallelize, simulate
from meshdiff.attention.problem import chunk_sizes
from meshdiff.autoshard.aliasing import AliasTracker
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.simulation import unwrap

BOUND = 1e-5

SHARED_OUT = {
    "WanTransformer3DModel": 2,
    "LTXVideoTransformer3DModel": 2,
    "FluxTransformer2DModel": 3,
    "QwenImageTransformer2DModel": 2,
}
"""Models and how many all-to-alls a block of theirs has at most: attention, and what is cut and joined for good."""


WRITES_TO_COPIES = ["view of a copy"]


def on_mesh(ranks: int):
    return init_mesh(Layout(cp=ranks), "cpu")["cp"]


@pytest.mark.parametrize("name", SHARED_OUT)
def test_a_model_of_diffusers_is_itself_and_gathers_nothing_in_a_block(name):
    with simulate(3):
        error, share, calls, _, replicated = of_diffusers(name, on_mesh(3))
    assert error <= BOUND
    assert share > 0.7
    assert not replicated
    for block, collectives in calls.items():
        if block != "outside of blocks":
            assert set(collectives) == {"all_to_all"}, block
            assert collectives["all_to_all"] <= SHARED_OUT[name]


@pytest.mark.parametrize("ranks", [2, 3])
def test_on_real_ranks_as_well(ranks, tmp_path):
    results = run_on_ranks(untouched_cases.many_of_diffusers, ranks, tmp_path)
    assert {name: found[0] <= BOUND for name, found in results.items()} == dict.fromkeys(results, True)
    assert {name for name, found in results.items() if found[4]} == set()  # no fallback
    assert run_on_ranks(untouched_cases.largest_gradient_error, ranks, tmp_path) <= 1e-4
    # Wan's contract: two exchanges for each of two self-attentions of 175 tokens with 5 heads of 12, and the output.
    for rank, traffic in enumerate(results["WanTransformer3DModel"][3]):
        assert traffic["cp"]["all_to_all"]["count"] == 4
        assert traffic["cp"]["all_to_all"]["bytes"] == 2 * attention_bytes(1, 175, 5, 12, ranks, rank)
        assert traffic["cp"]["all_gather"]["count"] == 1
    # Joint attention of 11 and 47 tokens, 5 heads of 12: the same two exchanges, as if nothing were joined.
    for rank, traffic in enumerate(results["QwenImageTransformer2DModel"][3]):
        assert traffic["cp"]["all_to_all"] == {"count": 4, "bytes": 2 * _joint_bytes((11, 47), 5, 12, ranks, rank)}


def _joint_bytes(lengths, heads, head_dim, ranks, rank):
    """What a rank sends when it attends to sequences as to one, of each of which it holds its part."""
    tokens = sum(chunk_sizes(length, ranks)[rank] for length in lengths)
    own = chunk_sizes(heads, ranks)[rank]
    return 4 * head_dim * (3 * tokens * (heads - own) + (sum(lengths) - tokens) * own)


class Joint(torch.nn.Module):
    """Text and tokens joined, turned, attended to and cut apart; `change` writes to a part or a join in between."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([JointBlock(change), JointBlock(change)])

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            text, hidden_states = block(hidden_states, text)
        return hidden_states


class JointBlock(torch.nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.to_query, self.to_key = torch.nn.Linear(CHANNELS, CHANNELS), torch.nn.Linear(CHANNELS, CHANNELS)
        self.attn_out, self.change = torch.nn.Linear(CHANNELS, CHANNELS), change

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [tensor * 1 for tensor in (text, hidden_states)]
        query, key = (
            torch.cat([layer(part).unflatten(-1, (3, -1)) for part in parts], dim=1)
            for layer in (self.to_query, self.to_key)
        )
        value = torch.cat(parts, dim=1).unflatten(-1, (3, -1))
        angles = torch.arange(float(query.shape[1]))[:, None, None]
        turned = torch.stack([-query[..., 1::2], query[..., ::2]], dim=-1).flatten(3)
        query = query.float() * angles.cos() + turned * angles.sin()
        seen = query.permute(0, 2, 1, 3)
        if self.change == "source":
            parts[1].mul_(2)
        elif self.change == "join":
            value.add_(1)
        elif self.change == "view":
            seen[:, 1] *= 2
        attended = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        text_out, out = attended.transpose(1, 2).flatten(2).split([text.shape[1], hidden_states.shape[1]], dim=1)
        return text + self.attn_out(text_out), hidden_states + self.attn_out(out) + parts[1]


@pytest.mark.parametrize("change", ["", "source", "join", "view"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_joins_that_nobody_looks_at_are_not_made(change, ranks):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Joint(change).requires_grad_(False)
    given = {"hidden_states": torch.randn(2, 13, CHANNELS), "text": torch.randn(2, 5, CHANNELS)}
    expected = model(**given)
    with simulate(ranks):
        parallel = parallelize(model, on_mesh(ranks))
        for _ in range(2):  # the second call does again what the first has found out
            with CommsCounter(on_mesh(ranks)) as comms:
                (found,) = values(parallel(**given))
            assert difference(found, expected) <= BOUND
    if not change:
        assert comms.as_dict()["cp"]["all_to_all"]["count"] == 4
        assert not parallel.replicated_kinds


class LooksAtMemory(JointBlock):
    """Takes text in replicated tensors only."""

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert text.data_ptr()
        return super().forward(hidden_states, text)


@pytest.mark.parametrize("kind", [JointBlock, LooksAtMemory])
@pytest.mark.parametrize("ranks", [2, 3])
def test_text_that_a_block_makes_shards_of_is_given_to_it_as_shards_if_it_takes_them(kind, ranks):
    model = Joint().requires_grad_(False)
    model.blocks = torch.nn.ModuleList([kind("")])
    calls = [
        {"hidden_states": given["hidden_states"] * i, "text": given["text"]}
        for given in [inputs(11, 5)]
        for i in (1, 2, 3)
    ]
    expected, shares = [model(**given) for given in calls], []
    with torch.no_grad(), simulate(ranks):
        parallel = parallelize(model, on_mesh(ranks))
        for given, one in zip(calls, expected, strict=True):
            (found,) = values(parallel(**given))
            assert difference(found, one) <= BOUND
            shares.append(parallel.report().sharded_share)
        assert not parallel.replicated_kinds
    assert (shares[1] > shares[0]) == (kind is JointBlock)
    assert shares[2] == shares[1]


@pytest.mark.parametrize("variant", ["none", "rows", "elsewhere", "scatter", "data", "one row", *WRITES_TO_COPIES])
@pytest.mark.parametrize("ranks", [2, 3])
def test_writes_and_looks_are_those_of_one_device(variant, ranks):
    model, given = Model(variant).requires_grad_(False), inputs()
    expected = model(**inputs())
    with simulate(ranks):
        parallel = parallelize(model, on_mesh(ranks))
        for _ in range(2):
            (found,) = values(parallel(**given))
            assert difference(found, expected) <= BOUND
    assert all(torch.equal(given[name], tensor) for name, tensor in inputs().items())
    assert bool(parallel.replicated_kinds) == (variant in WRITES_TO_COPIES)
    if parallel.replicated_kinds:
        assert "writes to memory that a view of it" in parallel.replicated_kinds["Block"]


def test_without_the_watch_over_memory_a_write_would_be_lost(monkeypatch):
    monkeypatch.setattr(meshdiff.autoshard.aliasing.AliasTracker, "has_live_aliases", lambda self, tensor: False)
    model, given = Model("view of a copy").requires_grad_(False), inputs()
    expected = model(**given)
    with simulate(2):
        (found,) = values(parallelize(model, on_mesh(2))(**given))
    assert difference(found, expected) > 1e-3


def test_what_a_thread_still_holds_is_not_in_use():
    aliases, source, copies = AliasTracker(), torch.randn(3), [torch.randn(3)]
    aliases.link(source, copies[0])
    threading.Timer(0.05, copies.clear).start()  # as one does that has sent it
    assert not aliases.has_live_aliases(source)
    copies = [torch.randn(3)]
    aliases.link(source, copies[0])
    assert aliases.has_live_aliases(source)


def test_gradients_arrive_whole_and_plain():
    one, other, given = Model("rows"), Model("rows"), inputs()
    one(**given).square().sum().backward()
    with simulate(3):
        parallel = parallelize(other, on_mesh(3))
        parallel(**given).square().sum().backward()
        assert not parallel.replicated_kinds
        assert parallel.report().sharded_share > 0.9
        for (name, expected), found in zip(one.named_parameters(), other.parameters(), strict=True):
            assert not isinstance(found.grad, DTensor)
            assert difference(unwrap(found.grad), expected.grad) <= 1e-4, name


def test_a_mistake_of_the_caller_is_reported_as_ever_and_forgotten():
    model, given = Model().requires_grad_(False), inputs()
    expected = model(**given)
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        with pytest.raises(RuntimeError, match=r"Sizes of tensors must match|size"):
            parallel(given["hidden_states"], given["text"][..., 1:])
        assert not parallel.replicated_kinds
        (found,) = values(parallel(**given))
    assert difference(found, expected) <= BOUND
    assert parallel.report().sharded_share > 0.9


@torch.no_grad()
def test_a_call_that_starts_again_does_so_from_what_it_was():
    given, alone, model = inputs(), Model("state"), Model("state")
    expected = [alone(**given) for _ in range(2)]
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        found = [unwrap(values(parallel(**given))[0]) for _ in range(2)]
        assert parallel.replicated_kinds
    assert all(difference(one, other) <= BOUND for one, other in zip(found, expected, strict=True))
    kept = [[block.calls for block in of.modules() if hasattr(block, "calls")] for of in (model, alone)]
    assert kept[0] == kept[1]


@torch.no_grad()
def test_a_call_that_has_written_to_weights_says_so_and_the_next_one_is_right():
    given, model = inputs(), Model("view of a copy")
    model.register_forward_pre_hook(lambda *_: None)
    own = model.forward

    def writes(*args, **kwargs):
        next(model.parameters()).mul_(1.0)
        return own(*args, **kwargs)

    model.forward = writes
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        with pytest.raises(RuntimeError, match=r"it has written to .* load its weights again and start again") as error:
            parallel(**given)
        assert "\n" not in str(error.value)
        (found,) = values(parallel(**given))
    assert difference(unwrap(found), Model("view of a copy")(**given)) <= BOUND


def test_ranks_meet_under_a_new_name_each_time_a_call_starts_again(monkeypatch):
    names: list[str] = []
    monkeypatch.setattr(
        sys.modules["meshdiff.autoshard.parallelized"],
        "agree_on_fallback",
        lambda mesh, name, kind, error: names.append(name),
    )
    model, given = Model("view of a copy").requires_grad_(False), inputs()
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        for _ in range(2):  # each mistake ends after some fallbacks, all of which are forgotten
            with pytest.raises(RuntimeError, match="size"):
                parallel(given["hidden_states"], given["text"][..., 1:])
        parallel(**given)
    assert len(names) == len(set(names)) == 5


def test_ranks_with_other_inputs_or_weights_are_told():
    model, given = Model().requires_grad_(False), inputs()
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        # A simulation draws for one rank after the other, so each has its own.
        apart = torch.randn(2, 7, CHANNELS, generator=torch.Generator().manual_seed(0))
        with pytest.raises(
            ValueError, match="Model has other inputs on rank 1 of this mesh than on rank 0; give every"
        ):
            parallel(apart, given["text"])
        model.attention_blocks[0].out.weight = torch.nn.Parameter(apart[0, 0, None] * torch.ones(CHANNELS, 1), False)
        with pytest.raises(ValueError, match="other weights on rank 1"):
            parallel(**given)


def test_ranks_that_part_later_are_told_when_all_is_checked(monkeypatch):
    model, given = Model().requires_grad_(False), inputs()
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        parallel(**given)
        apart = torch.randn(*given["hidden_states"].shape, generator=torch.Generator().manual_seed(0))
        monkeypatch.setenv("MESHDIFF_CHECK", "1")
        with pytest.raises(ValueError, match="other inputs on rank 1"):
            parallel(apart, given["text"])
        parallel(**given)
        last = torch.zeros(CHANNELS, CHANNELS)
        last[-1, -1] = 1
        out = model.attention_blocks[1].out
        out.weight = torch.nn.Parameter(out.weight + apart[0, 0, 0] * last, False)
        with pytest.raises(ValueError, match="other weights on rank 1"):
            parallel(**given)


def test_verify_finds_a_rank_that_does_something_else(monkeypatch):
    real = meshdiff.autoshard.lazy.exchange_into

    def broken(sources, outputs, dim, into):
        real(sources, outputs, dim, into)
        for output in into:
            output.to_local().mul_(1.01)

    model, given = Model().requires_grad_(False), inputs()
    with simulate(2):
        parallelize(model, on_mesh(2), verify=True)(**given)
    parallel_again = Model().requires_grad_(False)
    monkeypatch.setattr(meshdiff.autoshard.lazy, "exchange_into", broken)
    with simulate(2), pytest.raises(RuntimeError, match=r"verify: Model on this mesh differs .* by \d"):
        parallelize(parallel_again, on_mesh(2), verify=True)(**given)


def test_what_cannot_be_put_on_a_mesh_is_refused_in_a_line():
    model = Model()
    with simulate(4):
        mesh = init_mesh(Layout(cfg=2, cp=2), "cpu")
        with pytest.raises(ValueError, match='takes a 1-D mesh, mesh\\["cp"\\] say; given'):
            parallelize(model, mesh)
        with pytest.raises(ValueError, match=r"blocks=\['nowhere'\] are no submodules of Model"):
            parallelize(model, mesh["cp"], blocks=["nowhere"])
        parallel = parallelize(model, mesh["cp"])
        with pytest.raises(RuntimeError, match="nothing to report before the first call"):
            parallel.report()
        with pytest.raises(ValueError, match="is on a mesh already"):
            parallelize(model, mesh["cp"])
        parallel.remove()
        assert type(model) is Model
        compiled = Model()
        compiled.attention_blocks[0].compile()
        with pytest.raises(ValueError, match="is compiled"):
            parallelize(compiled, mesh["cp"])


def test_the_report_says_where_and_why():
    model, given = Model("scatter").requires_grad_(False), inputs()
    with simulate(2):
        parallel = parallelize(model, on_mesh(2))
        parallel(**given)
    text = str(parallel.report())
    assert text.startswith("Model on 2 ranks: ")
    assert "attention_blocks.0 to 1" in text
    assert "1 of 1 on shards" in text
    assert "together = torch.cat([text, hidden_states], dim=1)" in text
    assert "index_add_ (untouched_cases.py:" in text
