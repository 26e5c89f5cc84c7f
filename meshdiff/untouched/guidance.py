"""Guidance of pipelines that others wrote: the branches of a step run at once, one on each rank of `cfg`.

A pipeline either doubles the batch, which is then shared out between ranks, or
calls the model once a branch. Such a call is put off: if the next one comes
before anybody has looked at its output, both run at once. If somebody looks
first, it runs then, on all ranks. What it raises is raised to whoever looks.
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

from meshdiff.agreement import from_every_rank, is_of_collective
from meshdiff.attention.problem import chunk_ranges
from meshdiff.placements import BRANCHES
from meshdiff.simulation import is_simulated, on_each_rank
from meshdiff.untouched.compare import difference, tolerance
from meshdiff.untouched.later import Later
from meshdiff.untouched.parallel import replace_forward
from meshdiff.untouched.rank_checks import check_alike
from meshdiff.untouched.state import Ambient, ModelState

__all__ = ["Guidance"]

Meta = tuple[tuple[int, ...], torch.dtype]


@dataclass(eq=False)
class Call:
    """A call of the model, with tensors of its own, and its output, or what it raised, once it has run."""

    args: Any
    kwargs: Any
    ambient: Ambient
    output: Any = None
    error: BaseException | None = None

    @cached_property
    def signature(self) -> Any:
        leaves, structure = tree_flatten((self.args, self.kwargs))
        described = tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        return structure, described, self.ambient


class Guidance:
    """A model whose calls of one step run at once; see above.

    Args:
        module: the model, untouched or on a `cp` mesh already.
        mesh: the 1-D mesh of the ranks that share the branches.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        self.module, self.mesh = module, mesh
        self._forward = module.forward
        self._replaced = {key: value for key, value in vars(module).items() if key == "forward"}
        self._pending: list[Call] = []
        self._state: ModelState | None = None  # when the first of them was put off
        self._metas: dict[Any, list[list[Meta]] | None] = {}
        self._splits: dict[Any, bool] = {}
        self._seen: set[Any] = set()
        if mesh.size() > 1:
            replace_forward(module, self._call)

    def remove(self) -> None:
        """Give the model back the forward that it had."""
        if self.mesh.size() > 1:
            self._run()
            del vars(self.module)["forward"]
            vars(self.module).update(self._replaced)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._may_wait(args, kwargs):
            self._run()
            return self._forward(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # the caller may write to its own
        call = Call(args, kwargs, Ambient.now(self.mesh.device_type))
        if call.signature not in self._seen:
            check_alike(self.mesh, self.module, (args, kwargs))
            self._seen.add(call.signature)
        if _batch(call) > 1:
            self._run()
            return self._on_rows(call)
        self._put_off(call)
        if call.error is not None:
            raise call.error

        def look() -> Any:
            if call in self._pending:
                self._run()
            if call.error is not None:
                raise call.error
            return call.output

        return Later(look)

    def _put_off(self, call: Call) -> None:
        """Until the others of its step are there."""
        self._drop_if_changed()
        if not self._pending:
            self._state = ModelState(self.module)
        self._pending.append(call)
        if len(self._pending) == self.mesh.size():
            self._run_all()

    def _may_wait(self, args: Any, kwargs: Any) -> bool:
        """Whether the call may run later: its arguments can be kept, nobody trains, and no cache is on.

        That the model keeps nothing from one call to the next is not looked at.
        """
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        training = torch.is_grad_enabled() and any(t.requires_grad for t in [*tensors, *self.module.parameters()])
        known = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
        plain = all(isinstance(leaf, known) for leaf in leaves)
        return plain and not training and not getattr(self.module, "is_cache_enabled", False)

    def _run(self) -> None:
        """The calls that wait, if the model still is what they were made for."""
        self._drop_if_changed()
        self._run_all()

    def _drop_if_changed(self) -> None:
        what = self._state.changed(ModelState(self.module)) if self._state is not None else ""
        for call in self._taken() if what else ():
            call.error = RuntimeError(
                f"{type(self.module).__name__} was changed ({what}) between the calls of a guided step, the first of "
                "which had not run yet; look at its output before changing the model, or use a mesh without cfg"
            )

    def _taken(self) -> list[Call]:
        """The calls that wait, which then do no more."""
        calls, self._pending, self._state = self._pending, [], None
        return calls

    def _run_all(self) -> None:
        """All calls that wait, at once where that is possible."""
        calls = self._taken()
        outputs = None
        try:
            if len(calls) > 1 and not (is_simulated() and len({call.signature for call in calls}) > 1):
                outputs = self._at_once(calls)
        except BaseException as error:
            for call in calls:
                call.error = error
            raise
        if outputs is None:
            for call in calls:
                self._run_alone(call)
        else:
            for call, output in zip(calls, outputs, strict=True):
                call.output = output

    def _run_alone(self, call: Call) -> None:
        try:
            with call.ambient.again():
                call.output = self._forward(*call.args, **call.kwargs)
        except BaseException as error:
            call.error = error
            if not isinstance(error, Exception):
                raise

    def _at_once(self, calls: list[Call]) -> list[Any] | None:
        """Each rank does one of the calls, the last one if there is none for it, and gets the output of all.

        None if that is not possible: one of them raises, or what they return is not tensors alike.
        """
        key = tuple(call.signature for call in calls)
        if self._metas.get(key, ...) is None:
            return None
        try:
            output, structure = self._own_output(calls)
        except Exception as error:
            if key in self._metas or not _others_can_hear(error):
                raise
            from_every_rank(None, self.mesh)
            return None
        if key not in self._metas and not self._agree(key, output, structure):
            return None
        metas = self._metas[key]
        assert metas is not None
        self._check_shapes(output, metas[0 if is_simulated() else self.mesh.get_local_rank()])
        return self._exchanged(output, structure, metas)[: len(calls)]

    def _own_output(self, calls: list[Call]) -> tuple[list[Any], TreeSpec]:
        call = calls[min(self.mesh.get_local_rank(), len(calls) - 1)] if not is_simulated() else calls[0]
        args, kwargs = call.args, call.kwargs
        if is_simulated():
            leaves = [tree_flatten((call.args, call.kwargs)) for call in calls]
            of_calls = zip(*(leaf for leaf, _ in leaves), strict=True)
            own = [_own(self.mesh.get_local_rank(), *of_all) for of_all in of_calls]
            args, kwargs = tree_unflatten(own, leaves[0][1])
        with call.ambient.again():
            return tree_flatten(self._forward(*args, **kwargs))

    def _agree(self, key: Any, output: list[Any], structure: TreeSpec) -> bool:
        """Whether no rank's call has raised and all return alike, which is kept; a collective."""
        own = [(tuple(t.shape), t.dtype) for t in output if isinstance(t, Tensor)]
        kinds = [_kind(leaf) for leaf in output]
        everyone = from_every_rank((own, kinds, str(structure)), self.mesh)
        if None in everyone:
            return False
        alike = all(of_rank[1:] == everyone[0][1:] for of_rank in everyone)
        if not alike or any(isinstance(kind, str) for kind in everyone[0][1]):
            self._metas[key] = None
            warnings.warn(
                f"{type(self.module).__name__} does not return tensors alike from the calls of a guided step; "
                "every rank of cfg does all of them",
                stacklevel=2,
            )
            return False
        metas = [of_rank[0] for of_rank in everyone]
        self._metas[key] = metas if len(metas) > 1 else metas * self.mesh.size()
        return True

    def _check_shapes(self, output: list[Any], metas: list[Meta]) -> None:
        if [tuple(t.shape) for t in output if isinstance(t, Tensor)] != [shape for shape, _ in metas]:
            raise RuntimeError(
                f"{type(self.module).__name__} returns other shapes than before for inputs of the same shapes, which "
                "ranks of cfg cannot exchange; use a mesh without cfg, or put it on the mesh again if it has changed"
            )

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


def _kind(leaf: Any) -> torch.dtype | str | None:
    """What an output holds: a tensor of a dtype, nothing, or something that cannot be exchanged."""
    if isinstance(leaf, Tensor):
        return leaf.dtype
    return None if leaf is None else type(leaf).__name__


def _others_can_hear(error: Exception) -> bool:
    """Whether all ranks that do the same call have raised it, so that none of them waits for another."""
    return not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not is_of_collective(error)


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
