"""A call of a batch as calls of its rows, some on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from meshdiff.attention.problem import chunk_ranges
from meshdiff.simulation import on_each_rank
from meshdiff.untouched.branch_calls import Call
from meshdiff.untouched.branch_exchange import Form

__all__ = ["joined", "row_forms", "rows_of"]


def rows_of(call: Call, mesh: DeviceMesh) -> Any:
    """The arguments of a call for this rank's rows: those tensors are cut whose first dim is the batch."""
    batch, rank = call.batch, mesh.get_local_rank()
    ranges = chunk_ranges(batch, mesh.size())

    def of_rank(value: Tensor) -> Tensor:
        return _rows(ranges, rank, value) if value.ndim and value.shape[0] == batch else value

    return tree_map_only(Tensor, of_rank, call.own)


def row_forms(call: Call, mesh: DeviceMesh) -> list[list[Form]]:
    """By rank, of the tensors that a call returns for its rows."""
    tensors = [form for form in call.form.tensors if form is not None]
    return [
        [(torch.Size((max(1, len(own)), *shape[1:])), dtype) for shape, dtype in tensors]
        for own in chunk_ranges(call.batch, mesh.size())
    ]


def joined(call: Call, parts: Sequence[Sequence[Tensor]], mesh: DeviceMesh) -> Any:
    """The output of a call, of all ranks' tensors."""
    ranges = chunk_ranges(call.batch, mesh.size())
    tensors = [
        torch.cat([part[: len(own)] for part, own in zip(of_all, ranges, strict=True)])
        for of_all in zip(*parts, strict=True)
    ]
    return call.form.filled(tensors)


@on_each_rank
def _rows(ranges: tuple[range, ...], rank: int, tensor: Tensor) -> Tensor:
    """A rank's rows; a rank that has none does the last one, for nothing, to keep in step."""
    own = ranges[rank] or range(tensor.shape[0] - 1, tensor.shape[0])
    return tensor[own.start : own.stop]
