"""Attention cases that the simulation and real ranks both run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from meshdiff import CommsCounter, joint_attention, mesh_attention
from meshdiff.attention.strategy import STRATEGIES
from meshdiff.distributed.mesh import place
from meshdiff.distributed.simulation import on_each_rank, unwrap

ANY_HEADS = tuple(name for name in STRATEGIES if name != "hybrid")
"""Strategies for any number of heads on any number of ranks."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """An attention; `mask` is none, padding, full, additive, lowest, causal or causal padding."""

    queries: int
    heads: int = 4
    head_dim: int = 8
    batch: int = 1
    keys: int | None = None
    group: int = 1
    mask: str = "none"
    dtype: str = "float32"
    cross: bool = False
    strategy: str = "ulysses"

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        keys = self.keys or self.queries
        return self.batch, self.queries, keys, self.heads, self.heads // self.group, self.head_dim

    @property
    def is_causal(self) -> bool:
        return self.mask.startswith("causal")

    def tensors(self) -> list[Tensor]:
        """Query, key, value and the gradient of the output."""
        return list(_draw(self))

    def attn_mask(self) -> Tensor | None:
        return None if self.mask in ("none", "causal") else _draw_mask(self)


@on_each_rank  # or simulated ranks would take turns with the generator
def _draw(case: Case) -> tuple[Tensor, ...]:
    batch, queries, keys, heads, kv_heads, head_dim = case.shape
    generator = torch.Generator().manual_seed(queries)
    sizes = (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)
    return tuple(torch.randn(batch, n, h, head_dim, generator=generator).to(DTYPES[case.dtype]) for n, h in sizes)


@on_each_rank
def _draw_mask(case: Case) -> Tensor:
    batch, queries, keys, heads, _, _ = case.shape
    generator = torch.Generator().manual_seed(keys)
    if case.mask == "additive":
        return torch.randn(queries, keys, generator=generator).to(DTYPES[case.dtype])
    if case.mask == "lowest":  # how many mask whole rows, and keys, without an infinity
        lowest = torch.zeros(queries, keys, dtype=DTYPES[case.dtype])
        lowest[:, torch.rand(keys, generator=generator) < 0.2] = -1e4
        lowest[torch.rand(queries, generator=generator) < 0.4] = torch.finfo(lowest.dtype).min
        return lowest
    shape = (batch, 1, 1, keys) if "padding" in case.mask else (1, heads, queries, keys)
    return torch.rand(shape, generator=generator) < 0.7


def reference(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients of torch's own attention on one device, computed in `dtype`."""
    dtype = dtype or DTYPES[case.dtype]
    *inputs, gradient = (tensor.to(dtype) for tensor in case.tensors())
    inputs = [tensor.requires_grad_() for tensor in inputs]
    mask, is_causal = case.attn_mask(), case.is_causal
    if mask is not None and is_causal:  # torch takes one of them
        mask, is_causal = mask & torch.ones(case.shape[1:3], dtype=torch.bool).tril(), False
    output = F.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in inputs),
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(dtype),
        is_causal=is_causal,
        enable_gqa=case.group > 1,
    ).transpose(1, 2)
    output.backward(gradient)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def attend(case: Case, mesh: DeviceMesh) -> tuple[list[Tensor], dict]:
    """Output and gradients on a 1-D mesh, and what the forward and backward pass sent."""
    query, key, value, gradient = case.tensors()
    other = Replicate() if case.cross else Shard(1)
    placements = [Shard(1), other, other]
    inputs = [place(t, mesh, [p]).requires_grad_() for t, p in zip((query, key, value), placements, strict=True)]
    with CommsCounter(mesh) as comms:
        output = mesh_attention(*inputs, attn_mask=case.attn_mask(), is_causal=case.is_causal, strategy=case.strategy)
        forward = comms.as_dict()
        output.backward(place(gradient, mesh, [Shard(1)]))
        both = comms.as_dict()
    assert output.placements == (Shard(1),)
    values = [unwrap(t.full_tensor()).detach() for t in (output, *(i.grad for i in inputs))]
    return values, {"forward": forward, "both": both}


# Sequences and heads that 2, 3 and 4 ranks do and do not divide; fewer heads than ranks; more than one in a batch.
SELF = [
    Case(48, 12),
    Case(61, 8, batch=2),
    Case(10, 3, 16, batch=3, mask="full"),
    Case(33, 1, mask="causal padding", dtype="float16"),
    Case(40, 6, batch=2, mask="causal", group=3),
    Case(21, 4, keys=35, mask="additive", dtype="bfloat16"),
    Case(26, 5, mask="lowest"),
]
CASES = [replace(case, strategy=strategy) for case in SELF for strategy in ANY_HEADS]
CASES += [Case(61, 6, strategy="hybrid"), Case(61, 6, group=3, batch=2, strategy="hybrid", mask="causal")]
CASES += [Case(29, 6, batch=2, keys=5, cross=True, mask=mask) for mask in ("none", "causal", "full")]


def fits(case: Case, ranks: int) -> bool:
    """Whether that many ranks can run the case's strategy."""
    return case.strategy != "hybrid" or (ranks == 4 and case.heads % 4 != 0)


@dataclass(frozen=True)
class Joint:
    """Image and text tokens in one attention."""

    image: int
    text: int
    heads: int = 4
    text_first: bool = True
    whole_text: bool = True
    mask: str = "none"
    strategy: str = "ulysses"

    def tensors(self) -> tuple[Tensor, ...]:
        """Query, key, value of image, those of text, the gradients of both outputs, the mask."""
        return _draw_joint(self)


@on_each_rank
def _draw_joint(case: Joint) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(case.image)
    lengths = [case.image] * 3 + [case.text] * 3 + [case.image, case.text]
    tensors = [torch.randn(2, length, case.heads, 8, generator=generator) for length in lengths]
    return *tensors, torch.rand(2, 1, 1, case.image + case.text, generator=generator) < 0.8


JOINT = [
    Joint(29, 7, heads=6, mask="padding"),
    Joint(24, 3, text_first=False, whole_text=False, mask="causal"),
    Joint(16, 8, strategy="ring"),
    Joint(23, 5, heads=3, strategy="ring", text_first=False, mask="causal"),
    Joint(23, 5, strategy="gather", mask="padding", whole_text=False),
]


def attend_jointly(case: Joint, mesh: DeviceMesh | None) -> list[Tensor]:
    """Outputs and gradients of image and text; on one device without a mesh."""
    *inputs, of_image, of_text, padding = case.tensors()
    gradients = [of_image, of_text]
    if mesh is not None:
        text = Replicate() if case.whole_text else Shard(1)
        placements = [Shard(1)] * 3 + [text] * 3
        inputs = [place(t, mesh, [p]) for t, p in zip(inputs, placements, strict=True)]
        gradients = [place(t, mesh, [p]) for t, p in zip(gradients, (Shard(1), text), strict=True)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    outputs = joint_attention(
        inputs[:3],
        inputs[3:],
        text_first=case.text_first,
        attn_mask=padding if case.mask == "padding" else None,
        is_causal=case.mask == "causal",
        strategy=case.strategy,
    )
    torch.autograd.backward(outputs, gradients)
    values = [*outputs, *(tensor.grad for tensor in inputs)]
    if mesh is not None:
        assert outputs[1].placements == (text,)
        values = [unwrap(tensor.full_tensor()) for tensor in values]
    return [value.detach() for value in values]
