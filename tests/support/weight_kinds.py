"""Weights that are no plain tensors of float32, in a small transformer, and what it takes to spoil one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

CHANNELS = 64
"""A multiple of the 32 numbers that GGUF packs together."""


class Scaled(Tensor):
    """A tensor as two others, integers and their scale: the least that a class of tensors has to define."""

    integers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Scaled:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype, device=scale.device)

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, shape: Any, stride: Any) -> Scaled:
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            made = cls(func(args[0].integers), func(args[0].scale))
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        args, kwargs = tree_map_only(cls, lambda own: own.integers * own.scale, (args, kwargs or {}))
        return func(*args, **kwargs)


class Block(nn.Module):
    """Attention and a linear layer, and what `use` makes of further weights."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.attn_out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.use: Callable[[Block, Tensor], Tensor] | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in self.to_qkv(tokens).chunk(3, dim=-1))
        made = self.attn_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return tokens + (made if self.use is None else self.use(self, made))


class Model(nn.Module):
    """Two of these blocks, the same in every process."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            tokens = block(tokens)
        return (self.head(tokens),)


@dataclass(frozen=True)
class Kind:
    """Weights of one kind.

    Attributes:
        prepare: gives a model such weights.
        spoil: changes one value of one of them.
        needs: the package that they are of.
        is_captured: whether torch can trace operations on them.
    """

    prepare: Callable[[Model], object]
    spoil: Callable[[Model], object]
    needs: str = "torch"
    is_captured: bool = True

    @property
    def is_installed(self) -> bool:
        return find_spec(self.needs) is not None


KINDS: dict[str, Kind] = {}


def of_torchao(config: str) -> Callable[[Model], None]:
    def prepare(model: Model) -> None:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())

    return prepare


def spoil_integers(model: Model) -> None:
    integers = model.blocks[1].to_qkv.weight.qdata
    integers.view(torch.int8)[3, 5] += 1


def spoil_scale(model: Model) -> None:
    model.blocks[1].attn_out.weight.scale[-1] *= 2


KINDS["torchao int8"] = Kind(of_torchao("Int8WeightOnlyConfig"), spoil_integers, "torchao")
KINDS["torchao int8 dynamic"] = Kind(of_torchao("Int8DynamicActivationInt8WeightConfig"), spoil_scale, "torchao")
KINDS["torchao float8"] = Kind(of_torchao("Float8WeightOnlyConfig"), spoil_integers, "torchao")


def as_gguf(model: Model) -> None:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quantize

    kind = GGMLQuantizationType.Q8_0
    for block in model.blocks:
        for name in ("to_qkv", "attn_out"):
            layer = getattr(block, name)
            packed = GGUFLinear(layer.in_features, layer.out_features, bias=True, compute_dtype=torch.float32)
            weight = torch.from_numpy(quantize(layer.weight.detach().numpy(), kind))
            packed.weight, packed.bias = GGUFParameter(weight, quant_type=kind), layer.bias
            setattr(block, name, packed)


def spoil_gguf(model: Model) -> None:
    model.blocks[0].attn_out.weight.as_tensor()[1, 9] += 1


KINDS["GGUF"] = Kind(as_gguf, spoil_gguf, "gguf")


def as_scaled(model: Model) -> None:
    for block in model.blocks:
        weight = block.to_qkv.weight.detach()
        scale = weight.abs().amax() / 127
        block.to_qkv.weight = nn.Parameter(Scaled((weight / scale).round().to(torch.int8), scale), requires_grad=False)


KINDS["a class of their own"] = Kind(as_scaled, lambda model: model.blocks[0].to_qkv.weight.integers[0, 7].add_(1))


def kind(
    name: str, spoil: Callable[[Block], object], is_captured: bool = True
) -> Callable[[Callable[[Tensor], Any]], Callable[[Tensor], Any]]:
    """Register the function below, which makes a buffer of a weight, and what a block computes with it."""

    def register(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def prepare(model: Model) -> None:
            for block in model.blocks:
                buffer, block.use = make(block.attn_out.weight.detach())
                block.register_buffer("held", buffer)

        KINDS[name] = Kind(prepare, lambda model: spoil(model.blocks[1]), is_captured=is_captured)
        return make

    return register


def replaced(make: Callable[[Tensor], Tensor]) -> Callable[[Block], None]:
    def spoil(block: Block) -> None:
        block.held = make(block.held)

    return spoil


@kind(
    "quantized",
    replaced(lambda held: torch.quantize_per_tensor(held.dequantize(), 0.02, 1, torch.qint8)),
    is_captured=False,
)
def quantized(weight: Tensor) -> Any:
    return torch.quantize_per_tensor(weight, 0.01, 1, torch.qint8), lambda block, y: F.linear(
        y, block.held.dequantize()
    )


@kind(
    "quantized by channel",
    replaced(lambda held: per_channel(held.dequantize(), torch.full((CHANNELS,), 0.02))),
    is_captured=False,
)
def quantized_by_channel(weight: Tensor) -> Any:
    return per_channel(weight, torch.full((CHANNELS,), 0.01)), lambda block, y: F.linear(y, block.held.dequantize())


def per_channel(weight: Tensor, scales: Tensor) -> Tensor:
    return torch.quantize_per_channel(weight, scales, torch.zeros(CHANNELS), 0, torch.qint8)


@kind("sparse", lambda block: block.held._values()[3].add_(1))
def sparse(weight: Tensor) -> Any:
    return (weight * (weight > 0)).to_sparse(), lambda block, y: F.linear(y, (block.held * 2).coalesce().to_dense())


@kind("sparse by rows", lambda block: block.held.values()[3].add_(1), is_captured=False)
def sparse_by_rows(weight: Tensor) -> Any:
    return (weight * (weight > 0)).to_sparse_csr(), lambda block, y: F.linear(y, (block.held * 2).to_dense())


@kind("nested", lambda block: block.held.unbind()[1][2, 2].add_(1), is_captured=False)
def nested(weight: Tensor) -> Any:
    rows = torch.nested.nested_tensor([weight[:20], weight[20:]])
    return rows, lambda block, y: F.linear(y, torch.cat(block.held.unbind()))


@kind("complex, as its conjugate", lambda block: block.held[4].mul_(1j))
def conjugate(weight: Tensor) -> Any:
    return torch.complex(weight[0], weight[1]).conj(), lambda block, y: y * block.held.imag


@kind("float8", lambda block: block.held.view(torch.int8)[6, 6].add_(1))
def float8(weight: Tensor) -> Any:
    return weight.to(torch.float8_e4m3fn), lambda block, y: F.linear(y, block.held.to(y.dtype))


@kind("true and false", lambda block: block.held[2, 3].logical_not_())
def booleans(weight: Tensor) -> Any:
    return weight > 0, lambda block, y: F.linear(y, block.held.to(y.dtype))


@kind("one that is not there", replaced(lambda held: torch.empty(2, 3, device="meta")))
def meta(weight: Tensor) -> Any:
    return torch.empty(3, 3, device="meta"), lambda block, y: y


@kind("nothing", replaced(lambda held: torch.empty(0, 4)))
def nothing(weight: Tensor) -> Any:
    return torch.empty(0, 3), lambda block, y: y + block.held.sum()
