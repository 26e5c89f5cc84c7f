"""Between the plain tensors of a model and DTensors: whole on every rank, or a shard on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map_only

from meshdiff.placements import WHOLE

__all__ = [
    "as_whole",
    "is_plainly_placed",
    "is_sharded",
    "map_dtensors",
    "settled",
    "sharded_dim",
    "to_plain",
    "to_shards",
]

T = TypeVar("T")


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor of which each rank holds a part, or a sum that is a part."""
    return isinstance(tensor, DTensor) and not tensor.placements[0].is_replicate()


def is_plainly_placed(tensor: DTensor) -> bool:
    """Whether ranks hold all of this or consecutive parts; where dims were merged, they hold other ones."""
    return isinstance(tensor.placements[0], (Replicate, Shard))


def sharded_dim(tensor: Tensor) -> int | None:
    """The dim that ranks share out; None if each holds all."""
    placement = tensor.placements[0] if isinstance(tensor, DTensor) else None
    return placement.dim if isinstance(placement, Shard) else None


def as_whole(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A plain tensor, the same on every rank, as a DTensor; nothing is copied, and gradients are added up."""
    return tensor if isinstance(tensor, DTensor) else DTensor.from_local(tensor, mesh, [WHOLE], run_check=False)


def to_shards(tensor: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """A plain tensor, the same on every rank, of which each rank keeps a copy of its part; nothing is sent."""
    return as_whole(tensor, mesh).redistribute(placements=[Shard(dim)])


def to_plain(tensor: DTensor) -> Tensor:
    """All of a DTensor on every rank, plain; its gradient is the same on every rank and not added up.

    It lies in memory as on one device, where that has no gaps: whether a reshape is a view depends on it.
    """
    plain = tensor.redistribute(placements=[Replicate()]).to_local()
    order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride()[dim])
    if not _is_dense(tensor, order) or _is_dense(plain, order):
        return plain
    return plain.permute(order).contiguous().permute([order.index(dim) for dim in range(tensor.ndim)])


def _is_dense(tensor: Tensor, order: list[int]) -> bool:
    """Whether it lies in memory without gaps, dims from the outermost to the innermost."""
    expected = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1:
            if tensor.stride()[dim] != expected:
                return False
            expected *= tensor.shape[dim]
    return True


def settled(tensor: DTensor) -> DTensor:
    """Sums that ranks hold the parts of are added up; other DTensors are as they are."""
    return tensor.redistribute(placements=[Replicate()]) if tensor.placements[0].is_partial() else tensor


def map_dtensors(function: Callable[[DTensor], Any], value: T) -> T:
    """The same structure with every DTensor replaced."""
    return tree_map_only(DTensor, function, value)
