"""Small models that others might have written, and what it takes to run them on a mesh and on one device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from experiments.tiny_models.transformers import TINY
from meshdiff import CommsCounter, Layout, init_mesh, parallelize
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.simulation import outside, unwrap

CHANNELS, HEADS = 12, 3


class Block(nn.Module):
    """Self-attention over text and tokens, then what `variant` does to them in place."""

    def __init__(self, variant: str = "none") -> None:
        super().__init__()
        self.to_qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.variant = variant
        self.calls: list[int] = []

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        together = torch.cat([text, hidden_states], dim=1)
        query, key, value = self.to_qkv(together).chunk(3, dim=-1)
        query, key, value = CHANGES.get(self.variant, lambda *qkv: qkv)(query, key, value)
        if self.variant == "state":
            self.calls.append(1)
        if self.variant in ("state", "view of a copy"):
            part = key[:, 1:]
            part.mul_(2)
        heads = [tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2) for tensor in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return hidden_states + self.out(attended[:, text.shape[1] :])


def _rows(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    query = query.clone()  # autograd allows no writes to chunks
    query[:, 2:] = query[:, 2:] * 3
    return query, key, value


def _elsewhere(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    key[..., ::2] += 1
    return query, key, value


def _one_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    value[0, 1, 2] = 4.0
    return query, key, value


def _scatter(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    rows = torch.arange(value.shape[1] - 1, -1, -1)
    return query, key, torch.zeros_like(value).index_add_(1, rows, value)


def _data(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    if key.mean() > -10 and value[0, 0, 0].item() < 100:
        query = query * int((key > 0).sum())
    return query * 0.1, key, value.roll(1, dims=1)


CHANGES = {"rows": _rows, "elsewhere": _elsewhere, "one row": _one_row, "scatter": _scatter, "data": _data}


class Model(nn.Module):
    """Two of these blocks."""

    def __init__(self, variant: str = "none") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attention_blocks = nn.ModuleList([Block(variant), Block(variant)])

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        for block in self.attention_blocks:
            hidden_states = block(hidden_states, text)
        return hidden_states.mean(dim=1, keepdim=True) + hidden_states


def inputs(tokens: int = 7, text: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, tokens, CHANNELS, generator=generator),
        "text": torch.randn(2, text, CHANNELS, generator=generator),
    }


def values(output: Any) -> list[Tensor]:
    return [unwrap(leaf.detach()) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def of_diffusers(name: str, mesh: Any) -> tuple[float, float, dict, dict, dict]:
    """A model of diffusers on a mesh, twice.

    Returns:
        its error, the share of its work on shards, calls in each block, traffic of the second call, the kinds of
        blocks that ran replicated.
    """
    model, arguments = TINY[name].build(), outside_made(name)
    with torch.no_grad():
        with outside():
            expected = values(model(**arguments))
        parallel = parallelize(model, mesh)
        first = values(parallel(**arguments))
        with CommsCounter(mesh) as comms:
            second = values(parallel(**arguments))
    report = parallel.report()
    calls = {row["block"]: row["collectives"] for row in report.table()}
    error = max(difference(one, expected) for one in (first, second))
    return error, report.sharded_share, calls, comms.as_dict(), report.replicated_kinds


def many_of_diffusers() -> dict[str, tuple]:
    """Models of diffusers on all ranks: see `of_diffusers`, the traffic of every rank."""
    mesh, results = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], {}
    for name in (
        "WanTransformer3DModel",
        "FluxTransformer2DModel",
        "SD3Transformer2DModel",
        "QwenImageTransformer2DModel",
        "ZImageTransformer2DModel",  # lists in and out
        "HiDreamImageTransformer2DModel",  # experts that are chosen by the data
        "GlmImageTransformer2DModel",  # writes to slices
        "MochiTransformer3DModel",
    ):
        error, share, calls, traffic, replicated = of_diffusers(name, mesh)
        results[name] = error, share, calls, all_gather_object(traffic), replicated
    return results


def largest_gradient_error() -> float:
    """The largest relative error of a gradient of a model on shards, on any rank."""
    one, other, given = Model("rows"), Model("rows"), inputs()
    one(**given).square().sum().backward()
    parallel = parallelize(other, init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"])
    parallel(**given).square().sum().backward()
    assert not parallel.replicated_kinds
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(all_gather_object(max(difference(found.grad, expected.grad) for expected, found in pairs)))


def outside_made(name: str) -> dict[str, Any]:
    with outside():  # random numbers that are drawn in a simulation differ by rank
        return TINY[name].arguments()
