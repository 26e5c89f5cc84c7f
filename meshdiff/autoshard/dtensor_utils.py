"""Conversions between the plain tensors of a model and DTensors, replicated or sharded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from meshdiff.distributed.local_shards import to_shard, wrap
from meshdiff.distributed.placements import REPLICATED
from meshdiff.distributed.torch_compat import tree_leaves, tree_map_only

__all__ = [
    "all_replicated",
    "as_replicated",
    "dtensors",
    "is_plainly_placed",
    "is_sharded",
    "map_dtensors",
    "map_tensors",
    "once",
    "out_of_inference",
    "own_copy",
    "sharded_dim",
    "summed",
    "swapped",
    "to_plain",
    "to_shards",
]

LEAVES = {bool, int, float, complex, str, type(None), type(...), slice, torch.dtype, torch.device, torch.Size}
"""Types that hold no tensors; to search them with pytree takes longer than most operations."""


def out_of_inference(value: Any) -> Any:
    """The same structure with copies of tensors that were made in inference mode, where no writes are counted.

    In inference mode itself they stay as they are, since what is made there is like them.
    """
    if torch.is_inference_mode_enabled() or not any(
        isinstance(leaf, Tensor) and leaf.is_inference() for leaf in tree_leaves(value)
    ):
        return value  # itself: the model may add to a list or dict of its caller's
    return map_tensors(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)


def is_sharded(tensor: Any) -> bool:
    """True for a DTensor of which each rank holds a part, or a partial sum."""
    return isinstance(tensor, DTensor) and not tensor.placements[0].is_replicate()


def is_differentiated(*tensors: Tensor | None) -> bool:
    """True if autograd is to know of what is made of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plainly_placed(tensor: DTensor) -> bool:
    """True if each rank holds all of this or a consecutive part; where dims were merged, parts are not consecutive."""
    return isinstance(tensor.placements[0], (Replicate, Shard))


def sharded_dim(tensor: Tensor) -> int | None:
    """The dim that is sharded; None if there is none."""
    placement = tensor.placements[0] if isinstance(tensor, DTensor) else None
    return placement.dim if isinstance(placement, Shard) else None


def as_replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A plain tensor, the same on every rank, as a DTensor; nothing is copied, and gradients are added up."""
    return tensor if isinstance(tensor, DTensor) else wrap(tensor, mesh, REPLICATED, tensor.shape, tensor.stride())


def own_copy(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A replicated tensor as a plain one; its gradient is the sum of the gradients of all ranks."""
    if isinstance(tensor, DTensor) or (torch.is_grad_enabled() and tensor.requires_grad):
        return to_shard(as_replicated(tensor, mesh))
    return tensor


def all_replicated(value: Any, mesh: DeviceMesh) -> Any:
    """The same structure with every plain tensor `as_replicated`."""
    return map_tensors(Tensor, lambda tensor: as_replicated(tensor, mesh), value)


def to_shards(tensor: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """A plain tensor, the same on every rank, of which each rank keeps a copy of its part; nothing is sent."""
    return as_replicated(tensor, mesh).redistribute(placements=[Shard(dim)])


def to_plain(tensor: DTensor) -> Tensor:
    """All of a DTensor on every rank, plain; its gradient is the same on every rank and not added up.

    It lies in memory as on one device, where that has no gaps: whether a reshape is a view depends on it.
    """
    if not tensor.numel() and not tensor.requires_grad:
        return tensor.to_local().new_empty(tensor.shape)
    plain = tensor.redistribute(placements=[Replicate()]).to_local()
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride()[dim])
    if not _is_dense(tensor, order) or _is_dense(plain, order):
        return plain
    return plain.permute(order).contiguous().permute([order.index(dim) for dim in range(tensor.ndim)])


def _is_dense(tensor: Tensor, order: list[int]) -> bool:
    """True if it has no gaps in memory, with `order` as the dims from the outermost to the innermost."""
    expected = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1:
            if tensor.stride()[dim] != expected:
                return False
            expected *= tensor.shape[dim]
    return True


def swapped(tensor: Tensor) -> DTensor:
    """`tensor.transpose(1, 2)` of a DTensor with 4 dims: between the layout of torch's attention and of ours."""
    assert isinstance(tensor, DTensor)
    if torch.is_grad_enabled():
        return cast(DTensor, tensor.transpose(1, 2))  # DTensor's own, which autograd knows
    (a, b, c, d), (of_a, of_b, of_c, of_d) = tensor.shape, tensor.stride()
    placement = tensor.placements[0]
    if isinstance(placement, Shard) and placement.dim in (1, 2):
        placement = Shard(3 - placement.dim)
    return wrap(
        to_shard(tensor).transpose(1, 2),
        tensor.device_mesh,
        placement,
        torch.Size((a, c, b, d)),
        (of_a, of_c, of_b, of_d),
    )


def summed(tensor: DTensor) -> DTensor:
    """Sums that ranks hold the parts of are added up; other DTensors are as they are."""
    return tensor.redistribute(placements=[Replicate()]) if tensor.placements[0].is_partial() else tensor


def dtensors(value: Any) -> Iterator[DTensor]:
    """The DTensors in tuples, lists and the values of dicts."""
    if isinstance(value, DTensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            if type(entry) not in LEAVES:
                yield from dtensors(entry)


def map_dtensors(function: Callable[[DTensor], Any], value: Any) -> Any:
    """The same structure with every DTensor replaced."""
    return map_tensors(DTensor, function, value)


def map_tensors(kind: type[Tensor], function: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with every tensor of a kind replaced."""
    if type(value) in LEAVES:
        return value
    if isinstance(value, Tensor):
        return function(value) if isinstance(value, kind) else value
    if type(value) in (tuple, list):
        return type(value)([map_tensors(kind, function, entry) for entry in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, dict)):  # dicts, as of diffusers, pytree knows
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            entry = getattr(value, field.name)
            object.__setattr__(made, field.name, map_tensors(kind, function, entry))  # frozen ones, too
        return made
    return tree_map_only(kind, function, value)


def once(function: Callable[[DTensor], Tensor]) -> Callable[[DTensor], Tensor]:
    """One result for a DTensor, however often it is met: what is returned twice is one tensor."""
    made: dict[int, tuple[DTensor, Tensor]] = {}

    def call(tensor: DTensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = tensor, function(tensor)
        return made[id(tensor)][1]

    return call
