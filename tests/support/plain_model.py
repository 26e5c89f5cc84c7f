"""A transformer as others write them, and every way of putting its attention on a mesh."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from meshdiff import ContextParallel, place, sharded_attention
from meshdiff.distributed.mesh import replicate_module
from meshdiff.distributed.simulation import on_each_rank


class Attention(nn.Module):
    """Of a vision transformer: one projection, a reshape, a permute."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, dim = x.shape
        qkv = self.qkv(x).reshape(batch, seq, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(batch, seq, dim))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.query(x), *self.key_value(text).chunk(2, dim=-1))
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.cross = CrossAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return self.mlp(x + self.cross(x, text))


class PlainViT(nn.Module):
    """Knows nothing of meshes."""

    def __init__(self, dim: int = 24, heads: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x

    @staticmethod
    def example() -> tuple[PlainViT, Tensor, Tensor]:
        """A model, tokens of a length that nothing divides, and a text."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return PlainViT(), torch.randn(2, 29, 24), torch.randn(2, 6, 24)


def on_all_ways(mesh: DeviceMesh, gather: Callable[[Tensor], Tensor], whole: Callable[[Tensor], Tensor]) -> dict:
    """Output and gradient of the example on a mesh, by each way of dropping mesh attention in.

    Args:
        gather: the whole of a plain tensor of which ranks hold shards.
        whole: one rank's value of a tensor that all hold alike.
    """
    model, x, text = _same_everywhere()
    seq = x.shape[1]
    outcomes = {}

    def run(way: str, model: nn.Module, x: Tensor, text: Tensor, collect: Callable[[Tensor], Tensor]) -> None:
        x = x.detach().requires_grad_()
        output = model(x, text)
        output.square().sum().backward()
        outcomes[way] = collect(output).detach(), collect(x.grad)

    shard = chunk(x, mesh.size(), mesh.get_local_rank())
    with sharded_attention(mesh, seq_len=seq, whole=[text.shape[1]]):
        run("plain shards inside the context", model, shard, text, gather)

    shards_in = copy.deepcopy(model)
    parallelize_module(shards_in, mesh, {"blocks.*.attn": ContextParallel(seq_len=seq, strategy="ring")})
    run("a style from shards to shards", shards_in, shard, text, gather)

    whole_in = copy.deepcopy(model)
    style = ContextParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(whole_in, mesh, {"blocks.*.attn": style})
    run("a style from whole to whole", whole_in, x, text, whole)

    on_mesh = replicate_module(copy.deepcopy(model), mesh)
    with sharded_attention(strategy="gather"):
        run(
            "DTensors inside the context",
            on_mesh,
            place(x, mesh, [Shard(1)]),
            place(text, mesh, [Replicate()]),
            lambda t: whole(t.full_tensor()),
        )
    return outcomes


@on_each_rank
def chunk(x: Tensor, ranks: int, rank: int) -> Tensor:
    chunks = x.chunk(ranks, dim=1)
    return chunks[rank].clone() if rank < len(chunks) else x[:, :0].clone()


def _same_everywhere() -> tuple[PlainViT, Tensor, Tensor]:
    model, *_ = PlainViT.example()
    x, text = _draw()
    return model, x, text


@on_each_rank
def _draw() -> tuple[Tensor, Tensor]:
    _, x, text = PlainViT.example()
    return x, text
