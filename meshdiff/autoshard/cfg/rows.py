"""A call of a batch as calls of its rows, some on each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.problem import chunk_ranges
from meshdiff.autoshard.cfg.calls import Call, CallRecord, batch_of, others_can_hear
from meshdiff.autoshard.cfg.deferred import OutputForm
from meshdiff.autoshard.cfg.exchange import Form, exchange, fits
from meshdiff.autoshard.fallback import one_line
from meshdiff.autoshard.numerics import difference, tolerance
from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot
from meshdiff.autoshard.snapshot.policy import Policy
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.simulation import on_each_rank, outside, rank_values
from meshdiff.distributed.torch_compat import tree_leaves, tree_map_only

__all__ = ["alike_rows", "has_other_rows", "joined", "row_forms", "rows_of", "try_rows"]


def rows_of(call: Call, mesh: DeviceMesh) -> Any:
    """The arguments of a call for this rank's rows: those tensors are cut whose first dim is the batch."""
    batch, rank = call.batch, mesh.get_local_rank()
    ranges = chunk_ranges(batch, mesh.size())

    def of_rank(value: Tensor) -> Tensor:
        return _rows(ranges, rank, value) if value.ndim and value.shape[0] == batch else value

    return tree_map_only(Tensor, of_rank, call.own)


def alike_rows(args: Any, kwargs: Any, among: frozenset[int] | None = None) -> frozenset[int]:
    """The tensors among arguments (by their place) that have a row for each of the batch, all of them the same.

    Args:
        args, kwargs: of a call.
        among: check these only.
    """
    batch, found = batch_of(args, kwargs), set()
    for place, leaf in enumerate(tree_leaves((args, kwargs))):
        wanted = among is None or place in among
        if wanted and isinstance(leaf, Tensor) and not leaf.is_nested and leaf.ndim and leaf.shape[0] == batch:
            with outside(), torch.no_grad():
                own = rank_values(leaf)[0]
                if torch.equal(own, own[:1].expand_as(own)):
                    found.add(place)
    return frozenset(found)


def has_other_rows(record: CallRecord, args: Any, kwargs: Any) -> bool:
    """True if a call has tensors of several rows where those were all the same when rows were tried."""
    return bool(record.alike) and alike_rows(args, kwargs, record.alike) != record.alike


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


def try_rows(module: nn.Module, call: Call, expected: Any, mesh: DeviceMesh, number: int) -> tuple[Any, str]:
    """The output of a call as ranks make it of their rows, and why that is not right, "" if it is; a collective.

    What is a batch is a guess, which may be wrong and may raise. The model is as
    it was afterwards.

    Args:
        module: the model.
        call: which has run.
        expected: its output.
        mesh: of the ranks that share the rows.
        number: of the call.
    """
    before, reason = ModuleSnapshot(module, Policy.RESTORE), ""
    forms, own = row_forms(call, mesh), []
    try:
        own = OutputForm.tensors_of(call.run_with(rows_of(call, mesh)))
    except Exception as error:
        if not others_can_hear(error):
            raise
        reason = one_line(error)
    else:
        has_rows = all(form is None or (form[0] and form[0][0] == call.batch) for form in call.form.tensors)
        if not has_rows or not fits(own, forms, mesh):
            reason = "what it returns has other rows"
    before.restore(before.retake())
    reasons, output = all_gather_object(reason, mesh, f"rows of call {number}"), None
    if not any(reasons):
        parts = exchange(own, forms, mesh, call.device, number)
        assert parts is not None
        output = joined(call, parts, mesh)
        apart = difference(output, expected)
        off = "" if apart <= tolerance(expected) else f"it gives something else for them ({apart:.1e} apart)"
        reasons = all_gather_object(off, mesh, f"the outputs of rows of call {number}")
    return output, next(filter(None, reasons), "")


@on_each_rank
def _rows(ranges: tuple[range, ...], rank: int, tensor: Tensor) -> Tensor:
    """A rank's rows; a rank that has none does the last one, for nothing, to keep in step."""
    own = ranges[rank] or range(tensor.shape[0] - 1, tensor.shape[0])
    return tensor[own.start : own.stop]
