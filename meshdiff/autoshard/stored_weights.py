"""Weights of a module that others wrote, stored in parts or in host memory, and fetched when they are used.

A block's weights are fetched together, right before it runs, while the block before it runs; so are those of each
large module outside of the blocks, an embedding say. See `meshdiff.distributed.weight_streaming`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.autoshard.block_inputs import find_blocks
from meshdiff.autoshard.patching import Interception, owners
from meshdiff.autoshard.report import size_in_words
from meshdiff.autoshard.snapshot.code_state import PLAIN_TENSORS
from meshdiff.distributed.rank_checks import check_alike
from meshdiff.distributed.weight_streaming import Place, Recent, Storage, StreamedWeights

__all__ = ["StoredWeights"]

LEAST = 0.01
"""Part of a model's weights that a module outside of the blocks has at least to be worth fetching."""


@dataclass(eq=False)
class Group:
    """Weights that are fetched together.

    Attributes:
        modules: the modules that use them.
        places: of each parameter, where it is.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    places: dict[nn.Parameter, list[Place]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.places)


class StoredWeights:
    """The weights of a module, stored elsewhere from now on, but for small ones outside of blocks.

    Results keep their bits. Weights that are trained (`requires_grad`, where at least half of all are frozen) and those
    that are no plain tensors (quantized ones), stay where they are, on every rank.

    Args:
        module: any module, on the device of `storage` or in host memory.
        storage: the place of the weights; of its `divided` ranks, all have the same weights so far.
        blocks: submodules whose weights are fetched together, by name; by default `find_blocks(module)`.

    Raises:
        ValueError: if the weights are stored elsewhere already, by this class or by hooks of accelerate, or if ranks
            have different weights.
    """

    def __init__(self, module: nn.Module, storage: Storage, blocks: Iterable[str] | None = None) -> None:
        if any(isinstance(owner, StoredWeights) for owner in owners(module)):
            raise ValueError(f"{type(module).__name__}'s weights are stored elsewhere already; remove() that first")
        if any(hasattr(part, "_hf_hook") for part in module.modules()):
            raise ValueError(
                f"{type(module).__name__} has hooks of accelerate, which move its weights; leave out its "
                "enable_model_cpu_offload or device_map, offload=True does the same"
            )
        self.module, self._storage = module, storage
        if storage.divided is not None:
            check_alike(storage.divided, module, ())
        names = [name for name in (find_blocks(module) if blocks is None else blocks) if name]
        sizes = {True: 0, False: 0}
        for parameter in module.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        # Adapters are small; a model in which most is trained is one that nobody has frozen.
        self._needs_gradients = sizes[True] > sizes[False]
        groups = _groups(module, names, frozen_only=not self._needs_gradients)
        # Weakly: whoever else refers to a parameter keeps its values, and if nobody does its memory is free.
        self._originals = [[weakref.ref(parameter) for parameter in group.places] for group in groups]
        self._trained = [[parameter.requires_grad for parameter in group.places] for group in groups]
        self._weights: list[StreamedWeights] = []
        self._interceptions: list[Interception] = []
        recent = Recent()
        while groups:
            group = groups.pop(0)
            weights = StreamedWeights([*group.places.values()], storage, recent)
            weights.on_present = self._follow
            self._weights.append(weights)
            self._interceptions += [
                Interception(part, partial(self._call_with, weights), self) for part in group.modules.values()
            ]
        self._last: StreamedWeights | None = None
        self._interceptions.append(Interception(module, self._call, self))
        for tensor in (*module.parameters(), *module.buffers()):
            if type(tensor) in PLAIN_TENSORS and tensor.device.type != storage.device.type:
                tensor.data = tensor.data.to(storage.device)
        self.resident_bytes = sum(tensor.nbytes for tensor in module.parameters() if type(tensor) in PLAIN_TENSORS)
        """Size of the weights that every rank holds, in bytes."""

    @property
    def stored_bytes(self) -> int:
        """Size of what this rank stores, in bytes, on the device or in host memory."""
        return sum(weights.stored_bytes for weights in self._weights)

    @property
    def nbytes(self) -> int:
        """Size of all weights of the model, in bytes."""
        return self.resident_bytes + sum(weights.nbytes for weights in self._weights)

    @property
    def largest(self) -> int:
        """Size of the largest weights that are fetched together, in bytes; two such are held while a block runs."""
        return max((weights.nbytes for weights in self._weights), default=0)

    def __str__(self) -> str:
        where = "in host memory" if self._storage.on_host else "on its device"
        ranks = 1 if self._storage.divided is None else self._storage.divided.size()
        parts = f", divided between {ranks} ranks" if ranks > 1 else ""
        stored, resident, largest = map(size_in_words, (self.stored_bytes, self.resident_bytes, self.largest))
        text = (
            f"Weights: {size_in_words(self.nbytes)}{parts}; each rank stores {stored} {where}, holds {resident} that "
            f"are not fetched, and fetches at most {largest} at a time"
        )
        read = sum(weights.reads for weights in self._weights)
        return text + (f"; {read} times one was read outside of its module, which fetched it anew" if read else "")

    def fetch_all(self) -> None:
        """Fetch all weights, those of one group after the other, and release them again: to measure what it takes."""
        for weights in self._weights:
            with weights.present():
                pass

    def remove(self) -> None:
        """Put all weights back; a collective if ranks store a part each.

        Parameters that somebody else refers to are those that they were before, all others are new ones.
        """
        for interception in self._interceptions:
            interception.remove()
        for weights, originals, trained in zip(self._weights, self._originals, self._trained, strict=True):
            parameters = []
            for original, value, is_trained in zip(originals, weights.values(), trained, strict=True):
                parameter = original()
                if parameter is None or parameter.device != value.device:
                    parameter = nn.Parameter(value.clone(), requires_grad=is_trained)
                parameters.append(parameter)
            weights.put_back(parameters)
        self._weights, self._originals, self._trained = [], [], []

    def gathers_across(self, mesh: DeviceMesh) -> bool:
        """True if several ranks of this mesh gather weights together, so that all of them have to call the module."""
        divided = self._storage.divided
        return divided is not None and len({*divided.mesh.flatten().tolist()} & {*mesh.mesh.flatten().tolist()}) > 1

    def _refuse_gradients(self) -> None:
        if self._needs_gradients and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self.module).__name__} is called with gradients, and weights that are stored elsewhere get "
                "none; call it under torch.no_grad(), or freeze it before that: requires_grad_(False); adapters added "
                "then are trained"
            )

    def _call(self, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._refuse_gradients()
        try:
            return inner(*args, **kwargs)
        finally:
            self._last = None
            for weights in self._weights:
                weights.drop()

    def _call_with(self, weights: StreamedWeights, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._refuse_gradients()  # of a method that is not the module's forward
        with weights.present():
            return inner(*args, **kwargs)

    def _follow(self, weights: StreamedWeights) -> None:
        """Fetch weights in the order of the last call."""
        if self._last is not None and self._last is not weights:
            self._last.following, weights.preceding = weights, self._last
        self._last = weights


def _groups(module: nn.Module, blocks: list[str], frozen_only: bool) -> list[Group]:
    """The weights to store elsewhere, in the order of the module's own lists."""
    groups: dict[str, Group] = {}
    of_parameter: dict[nn.Parameter, str] = {}
    kept: set[nn.Parameter] = set()
    for path, part in module.named_modules():
        name = next((block for block in blocks if path == block or path.startswith(f"{block}.")), path)
        if name == path and name not in blocks and next(part.children(), None) is not None:
            # Its own weights are used by its own code, which calls what is in it as well.
            kept.update(parameter for parameter in part._parameters.values() if parameter is not None)
            continue
        for key, parameter in part._parameters.items():
            if type(parameter) is not nn.Parameter or parameter.is_meta or (frozen_only and parameter.requires_grad):
                continue
            first = of_parameter.setdefault(parameter, name)
            group = groups.setdefault(first, Group({first: module.get_submodule(first)}))
            group.places.setdefault(parameter, []).append((part, key))
            if name != first:
                _join(groups, of_parameter, first, name, module.get_submodule(name))
    for group in groups.values():
        group.places = {parameter: places for parameter, places in group.places.items() if parameter not in kept}
    least = LEAST * sum(group.nbytes for group in groups.values())
    wanted = [group for group in groups.values() if group.places]
    return [group for group in wanted if group.nbytes >= least or group.modules.keys() & set(blocks)]


def _join(groups: dict[str, Group], of_parameter: dict[nn.Parameter, str], first: str, name: str, part: Any) -> None:
    """Fetch the weights of module `name` together with the group `first`, with which it shares some."""
    other = groups.pop(name, Group())
    groups[first].modules.update({**other.modules, name: part})
    for parameter, places in other.places.items():
        groups[first].places.setdefault(parameter, []).extend(places)
        of_parameter[parameter] = first
