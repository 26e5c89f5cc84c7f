"""Guidance of pipelines that others wrote: the branches of a step at once, one on each rank of `cfg`.

A pipeline either doubles the batch, whose rows are then divided between ranks,
or calls the model once a branch. Such a call is deferred: its output is made of
tensors that are computed when they are first used. If the next call comes
before that, both run at once; else it runs then, on all ranks.

The first calls of each kind run on all ranks in their order, with the caller's
own tensors. That shows what a call returns, and whether it can be deferred at
all: a model that keeps something from one call to the next, or writes to what
it is given, never is. Later calls are checked as well, as a cache may begin at
some step: the model is then put back, and the calls run in their order.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.validation import is_checked
from meshdiff.autoshard.call_key import CallKey, call_key
from meshdiff.autoshard.cfg.calls import (
    Call,
    CallRecord,
    Failure,
    Written,
    are_alike,
    batch_of,
    others_can_hear,
    value_of_rank,
    why_undivided,
)
from meshdiff.autoshard.cfg.deferred import OutputForm
from meshdiff.autoshard.cfg.exchange import Form, exchange, fits
from meshdiff.autoshard.cfg.rows import alike_rows, has_other_rows, joined, row_forms, rows_of, try_rows
from meshdiff.autoshard.dtensor_utils import out_of_inference
from meshdiff.autoshard.fallback import one_line
from meshdiff.autoshard.grad_state import GradState
from meshdiff.autoshard.numerics import has_numbers
from meshdiff.autoshard.patching import Interception, owners
from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot, Unrestorable
from meshdiff.distributed.consensus import all_gather_object, is_first_rank
from meshdiff.distributed.rank_checks import check_alike, check_inputs, is_due
from meshdiff.distributed.simulation import is_simulated
from meshdiff.distributed.torch_compat import tree_leaves, tree_structure, tree_unflatten

__all__ = ["Guidance"]

KINDS = 256
"""Kinds of calls that are known at a time."""
CHANGES = 3
"""Times that the model may be changed between the calls of a step before these are no longer deferred."""
FAILURES = 3
"""Times that ranks may fail at their parts before calls are no longer divided."""
RETRIES = 8
"""Times that rows are tried again, as the model has changed."""
GROWS = 3
"""Calls of a kind after which a model may have grown, as by a table of positions, before it is said to keep state."""


_names = itertools.count()  # as in `parallelize`


class Guidance:
    """A model whose calls of one step run at once; see above.

    Args:
        module: the model, as it is or on a `cp` mesh already.
        mesh: the 1-D mesh of the ranks that share the branches.

    Raises:
        ValueError: if the model is on such a mesh already.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh) -> None:
        if any(isinstance(owner, Guidance) for owner in owners(module)):
            raise ValueError(f"{type(module).__name__} is on a cfg mesh already; remove() it there first")
        self.module, self.mesh = module, mesh
        self.fallback = ""
        """The reason why every rank does all calls from some time on, in their order; "" if they are divided."""
        self.undivided = ""
        """The same of the last call alone."""
        self._records: dict[CallKey, CallRecord] = {}
        self._pending: list[Call] = []
        self._state: ModuleSnapshot | None = None  # of the model, as it was seen last
        self._changes = self._failures = self._number = 0
        self._name, self._checks = f"guidance-{next(_names)}", itertools.count()
        self._interception = Interception(module, self._call, self) if mesh.size() > 1 else None

    def remove(self) -> None:
        """Calls of the model are its own again."""
        if self._interception is not None:
            self._run()
            self._interception.remove()

    def _call(self, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = out_of_inference((args, kwargs))
        self.undivided = why_undivided(self.module, self.mesh, args, kwargs)
        if self.undivided:
            self._run()
        record = self._record(args, kwargs)
        self._number += 1
        if is_checked() or record.calls == 1:
            check_alike(self.mesh, self.module, (args, kwargs))
        elif is_due(record.calls):
            check_inputs(self.mesh, self.module, (args, kwargs), f"{self._name}/{next(self._checks)}")
        if self.fallback or self.undivided:
            return inner(*args, **kwargs)
        again = record.on_rows and (self._has_changed(record) or has_other_rows(record, args, kwargs))
        if record.form is None or again:
            self._run()
            return self._try(record, inner, args, kwargs)
        call = Call(inner, (args, kwargs), record, GradState.capture(self.mesh.device_type))
        if record.on_rows and batch_of(args, kwargs) > 1:
            self._run()
            return self._on_rows(call)
        return self._defer(call)

    def _record(self, args: Any, kwargs: Any) -> CallRecord:
        key = call_key(self.module, args, kwargs, self.mesh.device_type)
        record = self._records.pop(key, None) or CallRecord()
        self._records[key] = record  # the latest is the last
        if len(self._records) > KINDS:
            del self._records[next(iter(self._records))]
        record.calls += 1
        return record

    def _has_changed(self, record: CallRecord) -> bool:
        """True if the model has changed since rows were last compared with the full batch; counts the changes."""
        now = self._now()
        what = "" if record.seen is None else record.seen.diff(now, drawn=False)
        record.seen = now
        if not what:
            return False
        record.retries += 1
        if record.retries == RETRIES:
            self._fall_back(f"is changed from step to step ({what})")
        return True

    def _now(self) -> ModuleSnapshot:
        """The model as it is now."""
        self._state = ModuleSnapshot(self.module) if self._state is None else self._state.retake()
        return self._state

    def _fall_back(self, reason: str) -> None:
        """Let every rank do all calls from now on."""
        if not self.fallback:
            self.fallback = reason
            self._warn(f"{reason}; every rank of cfg does all of its calls, in their order")

    def _warn(self, what: str) -> None:
        if is_first_rank():
            warnings.warn(f"{type(self.module).__name__} {what}", stacklevel=3)

    # The first calls of a kind, on all ranks in their order.

    def _try(self, record: CallRecord, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before, given = self._now(), Written((args, kwargs), by_value=True)
        output, error = None, None
        try:
            output = inner(*args, **kwargs)
        except Exception as raised:
            if not others_can_hear(raised):
                raise
            error = raised
        now = self._now()
        grew = before.only_grew(now)
        told = all_gather_object(
            (one_line(error) if error else "", before.diff(now), grew, given.was_written()),
            self.mesh,
            f"the end of call {self._number}",
        )
        error = error or self._of_other_rank([of_rank[0] for of_rank in told])
        if error is not None:
            raise error
        what = next((of_rank[1] for of_rank in told if of_rank[1]), "")
        if any(of_rank[3] for of_rank in told):
            self._fall_back("writes to what it is given")
        elif what and not (all(of_rank[2] for of_rank in told) and record.grew < GROWS):
            self._fall_back(f"keeps something from one call to the next ({what})")
        elif what:
            record.grew += 1
        else:
            return self._divide_later(record, inner, args, kwargs, output)
        return output

    def _of_other_rank(self, reasons: Sequence[str]) -> RuntimeError | None:
        """The error of a call that some ranks alone ran into; None if there are none."""
        for rank, reason in enumerate(reasons):
            if reason:
                model = type(self.module).__name__
                return RuntimeError(f"{model} raised on rank {rank} of this mesh and not on all: {reason}")
        return None

    def _divide_later(self, record: CallRecord, inner: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> Any:
        """Let ranks divide further calls of a kind, one of which has left the model as it was.

        Returns:
            the output, to the bit that of further calls.
        """
        form = OutputForm.of(output)
        if form is None:
            self._fall_back("does not return tensors alone")
            return output
        if batch_of(args, kwargs) > 1 and not has_numbers(output):
            return output  # with which nothing can be compared
        record.form, record.on_rows = form, False
        if batch_of(args, kwargs) > 1:
            call = Call(inner, (args, kwargs), record, GradState.capture(self.mesh.device_type))
            found, reason = try_rows(self.module, call, output, self.mesh, self._number)
            if reason:
                what = f"the {call.batch} rows of a batch apart from each other ({reason})"
                self._warn(f"does not do {what}; every rank of cfg does all of them")
            record.on_rows, record.seen, record.alike = not reason, self._now(), alike_rows(args, kwargs)
            return output if reason else found
        return output

    # A batch, each rank some of its rows.

    def _on_rows(self, call: Call) -> Any:
        self._now()
        parts = self._divided(call, rows_of(call, self.mesh), row_forms(call, self.mesh))
        if parts is not None:
            return joined(call, parts, self.mesh)
        self._run_in_order([call], shared=True)
        return call.result()

    # Calls of one row each, at once.

    def _defer(self, call: Call) -> Any:
        """Until the others of its step are there."""
        if self._pending:
            self._run_if_changed()
        if not self._pending:
            self._now()
        self._pending.append(call)
        if len(self._pending) == self.mesh.size():
            self._run_all()
            return call.result()
        return call.deferred(self._run)

    def _run(self) -> None:
        """The calls that wait."""
        self._run_if_changed()
        self._run_all()

    def _taken(self) -> list[Call]:
        calls, self._pending = self._pending, []
        return calls

    def _run_if_changed(self) -> None:
        """If the model is not what it was when they were made, run the calls that wait with what it was then."""
        if not self._pending:
            return
        before, now = self._state, self._now()
        assert before is not None
        what = before.diff(now)
        if not what:
            return
        calls, model = self._taken(), type(self.module).__name__
        try:
            before.restore(now)
            self._run_each(calls)
            after = before.retake()
            kept = before.diff(after)
            now.restore(after)
            self._state = None
        except Unrestorable as error:
            what = kept = str(error)
        for call in calls:
            if kept:
                call.error = RuntimeError(
                    f"{model} was changed ({what}) between the calls of a guided step, the first of "
                    "which had not run yet; look at its output before changing the model, or use a mesh without cfg"
                )
            call.hand_out()
        self._changes += 1
        if self._changes == CHANGES:
            self._fall_back(f"is changed between the calls of a step ({what})")

    def _run_all(self) -> None:
        """All calls that wait, at once where that is possible."""
        calls = self._taken()
        if not calls:
            return
        outputs, divided = None, len(calls) > 1 and are_alike(self.module, calls)
        try:
            if divided:
                outputs = self._at_once(calls)
        except BaseException as error:
            for call in calls:
                call.error = error
            raise
        if outputs is None:
            self._run_in_order(calls, shared=divided)
        for number, call in enumerate(calls):
            if outputs is not None:
                call.output = outputs[number]
            call.hand_out()

    def _run_each(self, calls: list[Call]) -> None:
        try:
            for call in calls:
                call.chosen = call.arguments()  # of all calls before the first of them may write to its own
        except Unrestorable:
            raise RuntimeError(
                f"{type(self.module).__name__} writes to what it is given, which was changed before the call could run "
                "on all ranks; use the output of each call before making the next, or a mesh without cfg"
            ) from None
        for call in calls:
            call.run()

    def _run_in_order(self, calls: list[Call], shared: bool) -> None:
        """All calls on all ranks; if they failed when they were `shared`, ranks exchange their errors."""
        self._run_each(calls)
        if not shared:
            return
        errors = [one_line(call.error) if call.error else "" for call in calls]
        told = all_gather_object(errors, self.mesh, f"the end of calls to {self._number}")
        for call, of_ranks in zip(calls, zip(*told, strict=True), strict=True):
            call.error = call.error or self._of_other_rank(of_ranks)

    def _at_once(self, calls: list[Call]) -> list[Any] | None:
        """Each rank does one of the calls, the last one if there is none for it, and gets the outputs of all."""
        ranks = [calls[min(rank, len(calls) - 1)] for rank in range(self.mesh.size())]
        forms = [[form for form in call.form.tensors if form is not None] for call in ranks]
        own = ranks[0 if is_simulated() else self.mesh.get_local_rank()]
        arguments = own.own
        if is_simulated():
            of_calls = zip(*(tree_leaves(call.own) for call in calls), strict=True)
            leaves = [value_of_rank(self.mesh.get_local_rank(), *of_all) for of_all in of_calls]
            arguments = tree_unflatten(leaves, tree_structure(own.own))
        parts = self._divided(own, arguments, forms)
        if parts is None:
            return None
        return [call.form.filled(own) for call, own in zip(calls, parts, strict=False)]

    # What is common to both.

    def _divided(self, call: Call, arguments: tuple[Any, Any], forms: list[list[Form]]) -> list[list[Tensor]] | None:
        """By rank, the tensors of its part of calls; None if they are to run on all ranks in their order.

        That is so if a part raises, keeps something in the model or writes to its
        inputs on any rank. The model is then what it was before.

        Args:
            call: of which this rank does a part, or all.
            arguments: of that part.
            forms: by rank, of the tensors of its part.
        """
        before, given = self._state or self._now(), Written(arguments)
        own, reason = None, ""
        try:
            own = OutputForm.tensors_of(call.run_with(arguments))
        except Exception as error:
            if not others_can_hear(error):
                raise
            reason = f"raised {one_line(error)}"
        else:
            if not fits(own, forms, self.mesh):
                reason = "returns other shapes than before for inputs of the same shapes"
        kept = before.diff(now) if (now := self._now()) is not before else ""
        wrote = given.was_written()
        failed = bool(reason or kept or wrote)
        parts = exchange(None if failed else own, forms, self.mesh, call.device, self._number)
        if parts is None:
            self._go_back(before, now, Failure(reason, kept, wrote))
        return parts

    def _go_back(self, before: ModuleSnapshot, now: ModuleSnapshot, own: Failure) -> None:
        """After a part that could not be done: have the model as it was, on all ranks."""
        lost = ""
        try:
            before.restore(now)
            self._state = None
        except Unrestorable as error:
            lost = str(error)
        told = all_gather_object((own, lost), self.mesh, f"a part of call {self._number} that failed")
        kept = next((of_rank.kept for of_rank, _ in told if of_rank.kept), "")
        if kept:
            self._fall_back(f"keeps something from one call to the next ({kept})")
        elif any(of_rank.wrote for of_rank, _ in told):
            self._fall_back("writes to what it is given")
        else:
            self._failures += 1
            if self._failures == FAILURES:
                self._fall_back(next(of_rank.reason for of_rank, _ in told if of_rank.reason))
        for _, name in told:
            if name:
                raise RuntimeError(
                    f"{type(self.module).__name__} has written to {name} in a call that was divided between ranks of "
                    "cfg, which now hold other values each; load the model again, its calls will then run on every "
                    "rank in their order"
                )
