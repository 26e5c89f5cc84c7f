"""How far two outputs are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["difference", "float_tensors", "tolerance"]

TOLERATED = {torch.float32: 1e-4, torch.float64: 1e-10}
HALF = 3e-2


def difference(output: Any, expected: Any) -> float:
    """The largest relative error, in L2 norm, of any tensor of an output."""
    pairs = zip(float_tensors(output), float_tensors(expected), strict=True)
    return max(
        (float((a - b).double().norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs if b.numel()),
        default=0.0,
    )


def tolerance(output: Any) -> float:
    """How far outputs of one program may be apart."""
    return max((TOLERATED.get(tensor.dtype, HALF) for tensor in float_tensors(output)), default=0.0)


def float_tensors(output: Any) -> list[Tensor]:
    """The floating point tensors of an output, in their order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
