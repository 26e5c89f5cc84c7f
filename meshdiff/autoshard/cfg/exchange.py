"""Outputs of ranks that each did a part of the work, on all of them, and whether any of them could not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from meshdiff.distributed.placements import BRANCHES
from meshdiff.distributed.simulation import is_simulated

__all__ = ["Form", "exchange", "fits"]

Form = tuple[torch.Size, torch.dtype]

ALIGNED = 16
"""Elements that what ranks send is a multiple of, so that what is cut from it is aligned in memory."""


def fits(own: Sequence[Tensor], forms: Sequence[Sequence[Form]], mesh: DeviceMesh) -> bool:
    """True if this rank's tensors have the forms that are expected of it.

    In a simulation they are compared only where all ranks have the same forms, and taken to fit elsewhere.
    """
    expected = forms[0 if is_simulated() else mesh.get_local_rank()]
    differ = is_simulated() and any(form != expected for form in forms)
    return differ or [(tensor.shape, tensor.dtype) for tensor in own] == expected


def exchange(
    own: Sequence[Tensor] | None,
    forms: Sequence[Sequence[Form]],
    mesh: DeviceMesh,
    device: torch.device,
    number: int,
) -> list[list[Tensor]] | None:
    """The tensors of all ranks, on all ranks: one all-gather for each.

    The first one carries two elements more: the number of the call, and a mark if the rank has failed.

    Args:
        own: this rank's tensors; None if it has failed.
        forms: by rank, shape and dtype of its tensors; dtypes are the same on all.
        mesh: a 1-D mesh.
        device: of the tensors.
        number: of the call, which is the same on all ranks if they call the model alike.

    Returns:
        by rank, its tensors; None if any of them has failed, which is read on the host.

    Raises:
        RuntimeError: on all ranks, if they do not exchange the same call.
    """
    gathered: list[list[Tensor]] = [[] for _ in forms]
    for place in range(len(forms[0])):
        sizes, dtype = [shape[place][0].numel() for shape in forms], forms[0][place][1]
        marks = torch.tensor([[number % (2 if dtype is torch.bool else 8), own is None]]).to(device, dtype)
        width = -(-(max(sizes) + marks.shape[1]) // ALIGNED) * ALIGNED
        flat = own[place].reshape(1, -1) if own is not None else torch.zeros(1, 0, dtype=dtype, device=device)
        row = torch.cat([flat, marks.new_zeros(1, width - flat.shape[1] - marks.shape[1]), marks], dim=1)
        rows = _of_all(row, mesh, len(forms))
        if place == 0 and is_simulated() and own is None:
            return None
        if place == 0 and not is_simulated():
            numbers, failed = rows[:, -2:].cpu().to(torch.complex64).real.T.tolist()
            if len(set(numbers)) > 1:
                raise RuntimeError(
                    "ranks of cfg do not call the model alike: one of them used an output or changed the model "
                    "between the calls of a step, or ended a call with an error of its own (out of memory, say) "
                    "and went on, and the others did not; do on every rank what one does"
                )
            if any(failed):
                return None
        for rank, form in enumerate(forms):
            gathered[rank].append(rows[rank, : sizes[rank]].view(form[place][0]))
    return gathered


def _of_all(row: Tensor, mesh: DeviceMesh, ranks: int) -> Tensor:
    shape = torch.Size((ranks, *row.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    shards = DTensor.from_local(row, mesh, [BRANCHES], run_check=False, shape=shape, stride=stride)
    return shards.redistribute(placements=[Replicate()]).to_local()
