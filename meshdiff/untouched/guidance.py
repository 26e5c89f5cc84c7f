"""Guidance of pipelines that others wrote: the branches of a step run at once, one on each rank of `cfg`.

A pipeline either doubles the batch, which is then shared out between ranks, or
calls the model once a branch. Such a call is put off: if the next one comes
before anybody has looked at its output, both run at once. If somebody looks
first, it runs then, on all ranks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from meshdiff.agreement import from_every_rank
from meshdiff.attention.problem import chunk_ranges
from meshdiff.placements import BRANCHES
from meshdiff.simulation import is_simulated, on_each_rank
from meshdiff.untouched.later import Later
from meshdiff.untouched.parallel import difference, replace_forward, tolerance
from meshdiff.untouched.retreat import check_alike

__all__ = ["Guidance"]

Meta = tuple[tuple[int, ...], torch.dtype]


@dataclass
class Call:
    """A call of the model, with tensors of its own, and its output once it has run."""

    args: Any
    kwargs: Any
    output: Any = None
    is_done: bool = False

    @cached_property
    def signature(self) -> Any:
        leaves, structure = tree_flatten((self.args, self.kwargs))
        return structure, tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves)


class Guidance:
    """A model whose calls of one step run at once; see above.

    Args:
        module: the model, untouched or on a `cp` mesh already.
        mesh: the 1-D mesh of the ranks that share the branches.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        self.module, self.mesh = module, mesh
        self._forward = module.forward
        self._pending: list[Call] = []
        self._metas: dict[Any, list[list[Meta]]] = {}
        self._splits: dict[Any, bool] = {}
        self._seen: set[Any] = set()
        if mesh.size() > 1:
            replace_forward(module, self._call)

    def remove(self) -> None:
        """Give the model back the forward that it had."""
        if self.mesh.size() > 1:
            vars(self.module)["forward"] = self._forward

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._may_wait(args, kwargs):
            self._run()
            return self._forward(*args, **kwargs)
        signature = Call(args, kwargs).signature
        if signature not in self._seen:
            check_alike(self.mesh, self.module, (args, kwargs))
            self._seen.add(signature)
        call = Call(*tree_map_only(Tensor, torch.clone, (args, kwargs)))  # the caller may write to its own
        if _batch(call) > 1:
            self._run()
            return self._on_rows(call)
        self._pending.append(call)
        if len(self._pending) == self.mesh.size():
            self._run()

        def look() -> Any:
            if not call.is_done:
                self._run()
            return call.output

        return Later(look)

    def _may_wait(self, args: Any, kwargs: Any) -> bool:
        """Whether the call gives the same later, and with parts of its batch: not with state, nor for training."""
        training = torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters())
        known = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
        plain = all(isinstance(leaf, known) for leaf in tree_leaves((args, kwargs)))
        return plain and not training and not getattr(self.module, "is_cache_enabled", False)

    def _run(self) -> None:
        """All calls that wait, at once."""
        calls, self._pending = self._pending, []
        if len(calls) == 1 or (is_simulated() and len({call.signature for call in calls}) > 1):
            outputs = [self._forward(*call.args, **call.kwargs) for call in calls]
        elif calls:
            outputs = self._at_once(calls)
        for call in calls:
            call.output, call.is_done = outputs.pop(0), True

    def _at_once(self, calls: list[Call]) -> list[Any]:
        """Each rank does one of the calls, the last one if there is none for it, and gets the output of all."""
        if is_simulated():
            leaves = [tree_flatten((call.args, call.kwargs)) for call in calls]
            own = [
                _own(self.mesh.get_local_rank(), *of_all) for of_all in zip(*(leaf for leaf, _ in leaves), strict=True)
            ]
            args, kwargs = tree_unflatten(own, leaves[0][1])
        else:
            call = calls[min(self.mesh.get_local_rank(), len(calls) - 1)]
            args, kwargs = call.args, call.kwargs
        output, structure = tree_flatten(self._forward(*args, **kwargs))
        key = tuple(call.signature for call in calls)
        if key not in self._metas:
            own_metas = [(tuple(t.shape), t.dtype) for t in output if isinstance(t, Tensor)]
            everyone = from_every_rank(own_metas, self.mesh)
            self._metas[key] = everyone if len(everyone) > 1 else everyone * self.mesh.size()
        return self._exchanged(output, structure, self._metas[key])[: len(calls)]

    def _exchanged(self, output: list[Any], structure: TreeSpec, metas: list[list[Meta]]) -> list[Any]:
        """Every rank's output, on all ranks: one all-gather for each of its tensors."""
        gathered: list[list[Any]] = [list(output) for _ in metas]
        places = [i for i, leaf in enumerate(output) if isinstance(leaf, Tensor)]
        for number, place in enumerate(places):
            sizes = [torch.Size(meta[number][0]).numel() for meta in metas]
            flat = output[place].reshape(1, -1)
            if len(set(sizes)) > 1:
                flat = torch.nn.functional.pad(flat, (0, max(sizes) - flat.shape[1]))
            rows = _of_all(flat, self.mesh, len(metas))
            for rank, meta in enumerate(metas):
                gathered[rank][place] = rows[rank, : sizes[rank]].view(meta[number][0])
        return [tree_unflatten(leaves, structure) for leaves in gathered]

    def _on_rows(self, call: Call) -> Any:
        """Each rank does its rows of the batch, if that has been seen to give the same."""
        if not self._splits.get(call.signature, True):
            return self._forward(*call.args, **call.kwargs)
        output = self._split(call)
        if call.signature not in self._splits:
            whole = self._forward(*call.args, **call.kwargs)
            self._splits[call.signature] = difference(output, whole) <= tolerance(whole)
            if not self._splits[call.signature]:
                warnings.warn(
                    f"{type(self.module).__name__} does not do the rows of a batch apart from each other; "
                    "every rank of cfg does all of them",
                    stacklevel=3,
                )
            return whole
        return output

    def _split(self, call: Call) -> Any:
        batch, rank = _batch(call), self.mesh.get_local_rank()
        ranges = chunk_ranges(batch, self.mesh.size())

        def of_rank(value: Tensor) -> Tensor:
            return _rows(ranges, rank, value) if value.ndim and value.shape[0] == batch else value

        args, kwargs = tree_map_only(Tensor, of_rank, (call.args, call.kwargs))
        output = self._forward(*args, **kwargs)

        def whole(part: Tensor) -> Tensor:
            return _of_all(_held(ranges, rank, part), self.mesh, batch)

        return tree_map_only(Tensor, whole, output)


def _batch(call: Call) -> int:
    """Rows of the first floating point tensor with more than one dim, which is what the model denoises."""
    for leaf in tree_leaves((call.kwargs.get("hidden_states"), call.args, call.kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
            return leaf.shape[0]
    return 1


def _of_all(rows: Tensor, mesh: DeviceMesh, total: int) -> Tensor:
    """All ranks' rows, on every rank."""
    shape = torch.Size((total, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    shards = DTensor.from_local(rows, mesh, [BRANCHES], run_check=False, shape=shape, stride=stride)
    return shards.redistribute(placements=[Replicate()]).to_local()


@on_each_rank
def _own(rank: int, *values: Any) -> Any:
    return values[min(rank, len(values) - 1)]


@on_each_rank
def _rows(ranges: tuple[range, ...], rank: int, tensor: Tensor) -> Tensor:
    """A rank's rows; a rank that has none does the last one, for nothing, to keep in step."""
    own = ranges[rank] or range(tensor.shape[0] - 1, tensor.shape[0])
    return tensor[own.start : own.stop]


@on_each_rank
def _held(ranges: tuple[range, ...], rank: int, tensor: Tensor) -> Tensor:
    return tensor[: len(ranges[rank])].contiguous()
