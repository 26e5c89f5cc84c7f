"""Measures of the difference between two outputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from meshdiff.distributed.torch_compat import tree_leaves

__all__ = ["difference", "float_tensors", "has_numbers", "not_numbers", "one_sided", "tolerance"]

TOLERATED = {torch.float32: 1e-4, torch.float64: 1e-10}
HALF = 3e-2


def difference(output: Any, expected: Any) -> float:
    """The largest relative error, in L2 norm, of any tensor of an output.

    Where both have NaN, or the same infinity, they are equal; where only one has, the error is infinite.
    """
    pairs = zip(float_tensors(output), float_tensors(expected), strict=True)
    return max((_relative_error(a, b) for a, b in pairs if a.numel() or b.numel()), default=0.0)


def _relative_error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    error = torch.where((a == b) | (a.isnan() & b.isnan()), 0, a - b).double().norm()
    size = torch.where(b.isfinite(), b, 0).double().norm()
    return float((error / size.clamp_min(1e-30)).nan_to_num(nan=math.inf, posinf=math.inf))


def one_sided(output: Any, expected: Any, model: str) -> str:
    """NaN or infinities that only one of two outputs has, in words of which `output` is the subject; "" if none.

    Args:
        output, expected: with tensors of the same shapes.
        model: what gave `expected`, in words.
    """
    pairs = list(zip(float_tensors(output), float_tensors(expected), strict=True))
    for name, is_one in (("NaN", torch.isnan), ("infinities", torch.isinf)):
        ones = [(is_one(a), is_one(b)) for a, b in pairs if a.shape == b.shape]
        if any(bool((own & ~other).any()) for own, other in ones):
            return f"gives {name} where {model} does not"
        if any(bool((other & ~own).any()) for own, other in ones):
            return f"gives no {name} where {model} does"
    return ""


def not_numbers(output: Any) -> str:
    """Number of values of an output that are NaN or infinite, in words; "" if there are none."""
    tensors = float_tensors(output)
    kinds = {"NaN": torch.isnan, "infinite": torch.isinf}
    counts = {name: sum(int(is_one(tensor).sum()) for tensor in tensors) for name, is_one in kinds.items()}
    total = sum(tensor.numel() for tensor in tensors)
    found = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    return f"{found} of {total:,} values" if found else ""


def has_numbers(output: Any) -> bool:
    """True if some value is finite, or there are no values: outputs of nothing but NaN are equal to each other."""
    tensors = [tensor for tensor in float_tensors(output) if tensor.numel()]
    return not tensors or any(bool(tensor.isfinite().any()) for tensor in tensors)


def tolerance(output: Any) -> float:
    """The largest `difference` that two outputs of one program may have."""
    return max((TOLERATED.get(tensor.dtype, HALF) for tensor in float_tensors(output)), default=0.0)


def float_tensors(output: Any) -> list[Tensor]:
    """The floating point tensors of an output, in their order; complex ones as pairs of such numbers."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [
        torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        for leaf in leaves
        if leaf.is_floating_point() or leaf.is_complex()
    ]
