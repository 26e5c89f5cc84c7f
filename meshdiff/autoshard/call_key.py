"""The identity of a call of a model: calls of one key run in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshdiff.autoshard.grad_state import GradState
from meshdiff.autoshard.snapshot.code_state import PLAIN_TENSORS, SMALL, value_key
from meshdiff.distributed.torch_compat import TreeSpec, tree_flatten

__all__ = ["CallKey", "call_key"]

LONGEST = 50
"""Letters of a string that count; more are a prompt."""


@dataclass(frozen=True)
class CallKey:
    """A hashable key of a call; see `call_key`.

    Attributes:
        leaves: what counts of each argument, in the order of pytree.
        structure: the lists, dicts and dataclasses that arguments are in.
        grad_state: the settings of torch around the call.
        training: of the module.
        opaque: of an exact key, the kind of an argument of which not all is in the key; "" if there is none.
    """

    leaves: tuple[Any, ...]
    structure: TreeSpec
    grad_state: GradState
    training: bool
    opaque: str = ""

    @property
    def shapes(self) -> str:
        """The shapes of the tensors among the arguments."""
        shapes = [part for leaf in self.leaves if isinstance(leaf, tuple) for part in leaf]
        return ", ".join(str(tuple(part)) for part in shapes if isinstance(part, torch.Size))


def call_key(module: nn.Module, args: Any, kwargs: Any, device_type: str, *, exact: bool = False) -> CallKey:
    """The key of a call, in one of two granularities.

    Plain keys are for what is decided once for calls of a shape, as the placement of tokens and the division of a
    guided step: tensors count by shape and dtype, numbers by their type, since a timestep is another one in each call.
    Exact keys are for graphs, which have all else in them than values of tensors: tensors count by strides, device and
    gradient as well and by which of them are one tensor, numbers by their value.

    Args:
        module: the module that is called.
        args, kwargs: what it is called with, any structure of tensors and other values.
        device_type: of the mesh, of which autocast counts beside that of the CPU.
        exact: for a graph.
    """
    leaves, structure = tree_flatten((args, kwargs))
    grad_state = GradState.capture(device_type)
    if not exact:
        return CallKey(tuple(map(_plain, leaves)), structure, grad_state, module.training)
    places: dict[int, int] = {}
    facts = tuple(_exact(leaf, places) for leaf in leaves)
    opaque = next(filter(None, map(_opaque, leaves)), "")
    return CallKey(facts, structure, grad_state, module.training, opaque)


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.size(0) if leaf.is_nested else leaf.shape, leaf.dtype
    if isinstance(leaf, str):
        return leaf[:LONGEST]
    return leaf if isinstance(leaf, bool) else type(leaf)


def _exact(leaf: Any, places: dict[int, int]) -> Any:
    if isinstance(leaf, Tensor):
        place = places.setdefault(id(leaf), len(places))
        layout = () if _opaque(leaf) else (leaf.stride(), leaf.is_conj(), leaf.is_neg())
        return *_plain(leaf), place, type(leaf), leaf.device, leaf.requires_grad, layout
    if type(leaf) in SMALL:
        return value_key(leaf)
    return (type(leaf), leaf) if isinstance(leaf, (int, float, str)) else type(leaf)  # a member of an enum, say


def _opaque(leaf: Any) -> str:
    """The kind of an argument that a key cannot distinguish from all others; "" if it can."""
    if type(leaf) in SMALL:
        return ""
    if type(leaf) not in PLAIN_TENSORS:
        return f"a {type(leaf).__name__}, which may hold anything"
    if leaf.layout != torch.strided or leaf.is_nested:
        return "a tensor without strides, a sparse or nested one"
    return ""
