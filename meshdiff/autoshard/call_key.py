"""What decides how a call of a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meshdiff.autoshard.grad_state import GradState
from meshdiff.autoshard.snapshot.code_state import SMALL
from meshdiff.distributed.torch_compat import tree_flatten

__all__ = ["PLAIN", "NotCaptured", "described", "is_due", "signature_of"]

PLAIN = (Tensor, nn.Parameter)


class NotCaptured(Exception):
    """This call has no program, for this reason."""


def signature_of(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What decides how a call runs on a mesh: the shapes of its tensors, and the small values among the rest."""
    leaves, structure = tree_flatten((args, kwargs))
    facts = tuple(
        ((len(leaf), "nested") if leaf.is_nested else tuple(leaf.shape), leaf.dtype)
        if isinstance(leaf, Tensor)
        else str(leaf)[:50]
        if isinstance(leaf, (bool, str)) or leaf is None
        else type(leaf)
        for leaf in leaves
    )
    return facts, str(structure), torch.is_grad_enabled(), module.training


def is_due(calls: int) -> bool:
    """Whether ranks compare the inputs of the call of that number, from 1.

    The first ones, of which the second or third is already of what a sampler has
    made of the noise that it drew, and others more and more seldom.
    """
    return calls <= 4 or calls & (calls - 1) == 0


def described(args: Any, kwargs: Any, device_type: str) -> tuple[Any, list[Tensor]]:
    """What decides the program of a call, and its tensors, each once."""
    grad_state = GradState.capture(device_type)
    if grad_state.grad or grad_state.inference or any(dtype is not None for _, dtype in grad_state.autocast):
        raise NotCaptured("only calls under torch.no_grad() and without autocast are captured")
    leaves, structure = tree_flatten((args, kwargs))
    tensors: dict[int, Tensor] = {}
    places: dict[int, int] = {}
    facts_of: list[Any] = []
    for leaf in leaves:
        if type(leaf) in PLAIN and (leaf.layout != torch.strided or leaf.is_nested):
            raise NotCaptured("it is given a tensor without strides, a sparse or nested one")
        if type(leaf) in PLAIN:
            place = places.setdefault(id(leaf), len(places))
            tensors[id(leaf)] = leaf
            layout = leaf.shape, leaf.stride(), leaf.is_conj(), leaf.is_neg()
            facts_of.append((place, *layout, leaf.dtype, leaf.device, leaf.requires_grad))
        elif type(leaf) in SMALL:
            facts_of.append((type(leaf), repr(leaf) if type(leaf) is float else leaf))  # else 0.0 would be -0.0
        else:
            raise NotCaptured(f"it is given a {type(leaf).__name__}, which may hold anything")
    return (structure, tuple(facts_of)), list(tensors.values())
