"""Calls of a guided model: what they are given and return, and that it can be kept until they run."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.autoshard.call_key import call_key
from meshdiff.autoshard.cfg.deferred import DeferredTensor, OutputForm
from meshdiff.autoshard.grad_state import GradState, Surroundings
from meshdiff.autoshard.patching import owners
from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot, Unrestorable
from meshdiff.autoshard.snapshot.walk import version
from meshdiff.autoshard.stored_weights import StoredWeights
from meshdiff.distributed.consensus import is_collective_error
from meshdiff.distributed.fingerprint import fingerprint, sha256
from meshdiff.distributed.simulation import is_simulated, on_each_rank
from meshdiff.distributed.torch_compat import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "Call",
    "CallRecord",
    "Failure",
    "Written",
    "are_alike",
    "batch_of",
    "others_can_hear",
    "value_of_rank",
    "why_undivided",
]


PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)
"""Arguments that are what they are later as well."""


@dataclass
class CallRecord:
    """A record of the calls of one plain call key.

    Attributes:
        calls: number of calls so far.
        grew: number of them that added to what the model holds.
        form: of what they return; None until one has run that left the model as it was.
        on_rows: True if ranks can do rows of the batch; None until that was tried.
        alike: tensors of as many rows as the batch that were all the same in that trial, which is no test of them.
        seen: the model with which that was tried last.
        retries: number of times it was tried again, as the model had changed.
    """

    calls: int = 0
    grew: int = 0
    form: OutputForm | None = None
    on_rows: bool | None = None
    alike: frozenset[int] = frozenset()
    seen: ModuleSnapshot | None = None
    retries: int = 0


@dataclass(eq=False)
class Call:
    """A call of the model, with tensors of its own, and its output, or what it raised, once it has run."""

    inner: Callable[..., Any]
    given: tuple[Any, Any]
    record: CallRecord
    grad_state: GradState
    surroundings: Surroundings = field(default_factory=Surroundings)
    own: tuple[Any, Any] = field(init=False)
    versions: list[int] = field(init=False)
    chosen: tuple[Any, Any] | None = None
    given_out: Any = None
    output: Any = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        clones: dict[int, Tensor] = {}

        def clone(tensor: Tensor) -> Tensor:
            if id(tensor) not in clones:
                clones[id(tensor)] = tensor.clone()
            return clones[id(tensor)]

        self.own = tree_map_only(Tensor, clone, self.given)  # the caller may write to its tensors
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [version(leaf) for leaf in tree_leaves((self.given, self.own)) if isinstance(leaf, Tensor)]

    @property
    def form(self) -> OutputForm:
        """Of what it is to return."""
        assert self.record.form is not None
        return self.record.form

    @property
    def device(self) -> torch.device:
        assert self.form.device is not None
        return self.form.device

    @property
    def batch(self) -> int:
        return batch_of(*self.own)

    @property
    def wrote(self) -> bool:
        """True if it has written to its tensors."""
        half = len(self.versions) // 2
        return self.versions[half:] != self._versions()[half:]

    def arguments(self) -> tuple[Any, Any]:
        """The caller's own tensors, which the call may write to, or if they are no longer what they were, its copies.

        Raises:
            Unrestorable: if neither are what the call was given.
        """
        half = len(self.versions) // 2
        if self.versions[:half] == self._versions()[:half]:
            return self.given
        if self.wrote:
            raise Unrestorable("its inputs")
        return self.own

    def run_with(self, arguments: tuple[Any, Any]) -> Any:
        """The output of the model for these arguments."""
        args, kwargs = arguments

        def call() -> Any:
            with self.grad_state.restore():
                return self.inner(*args, **kwargs)

        return self.surroundings.run(call)

    def run(self) -> None:
        """As on one device, with `arguments` that were chosen before any call of the step ran."""
        try:
            self.output = self.run_with(self.chosen or self.arguments())
        except BaseException as error:
            self.error = error
            if not isinstance(error, Exception):
                raise

    def deferred(self, compute: Callable[[], None]) -> Any:
        """A stand-in for the output until `compute` has run the call."""

        def result() -> Any:
            if self.output is None and self.error is None:
                compute()
            return self.result()

        self.given_out = self.form.deferred(result)
        return self.given_out

    def hand_out(self) -> None:
        """Let the tensors that stand for the output be it."""
        if self.given_out is None or self.error is not None:
            return
        leaves, structure = tree_flatten(self.output)
        for place, deferred in enumerate(tree_leaves(self.given_out)):
            if isinstance(deferred, DeferredTensor) and place < len(leaves) and deferred.become(leaves[place]):
                leaves[place] = deferred
        self.output, self.given_out = tree_unflatten(leaves, structure), None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.output


class Written:
    """A check that tensors, and the lists and dicts that they are in, are not written to.

    Args:
        values: any structure of tensors.
        by_value: compare values as well, as writes to `tensor.data` are not counted.
    """

    def __init__(self, values: Any, by_value: bool = False) -> None:
        self._by_value = by_value
        self._values = values
        self._leaves, self._structure = tree_flatten(values)
        self._tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._versions = self._now()

    def _now(self) -> list[Any]:
        read = [fingerprint(tensor, sha256) for tensor in self._tensors] if self._by_value else []
        return [[version(tensor) for tensor in self._tensors], read]

    def was_written(self) -> bool:
        leaves, structure = tree_flatten(self._values)
        same = structure == self._structure and all(map(operator.is_, leaves, self._leaves))
        return not same or self._versions != self._now()


def batch_of(args: Any, kwargs: Any) -> int:
    """Rows of the first floating point tensor with more than one dim, which is what the model denoises."""
    for leaf in tree_leaves((kwargs.get("hidden_states"), args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1:
            return leaf.shape[0]
    return 1


@dataclass(frozen=True)
class Failure:
    """Why a rank's part of a call was in vain.

    Attributes:
        reason: a description of what it raised or returned; "" if that was as it should be.
        kept: the name of what it changed in the model; "" if nothing.
        wrote: True if it wrote to what it was given.
    """

    reason: str
    kept: str
    wrote: bool


def others_can_hear(error: Exception) -> bool:
    """True if all ranks that do the same call have raised it, so that none of them waits for another."""
    return not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not is_collective_error(error)


def why_undivided(module: nn.Module, mesh: DeviceMesh, args: Any, kwargs: Any) -> str:
    """Why arguments cannot be kept for later and sent in part; "" if they can."""
    leaves = tree_leaves((args, kwargs))
    if getattr(module, "is_cache_enabled", False):
        return "has a cache of diffusers on"
    if any(isinstance(owner, StoredWeights) and owner.gathers_across(mesh) for owner in owners(module)):
        return "has weights that ranks of cfg gather together, which other branches may need in another order"
    for leaf in leaves:
        if not isinstance(leaf, PLAIN):
            return f"is given a {type(leaf).__name__}, which may hold anything"
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in [*tensors, *module.parameters()])
    return "is called with gradients" if training else ""


def are_alike(module: nn.Module, calls: list[Call]) -> bool:
    """True if tensors that they return can be exchanged; a simulation has one flow of Python for all ranks."""
    dtypes = {tuple(form and form[1] for form in call.form.tensors) for call in calls}
    devices = {call.form.device for call in calls}
    if len(dtypes) != 1 or len(devices) != 1:
        return False
    settings = [
        (call_key(module, *call.own, call.device.type, exact=True), call.grad_state, call.surroundings)
        for call in calls
    ]
    return not is_simulated() or all(one == settings[0] for one in settings)


@on_each_rank
def value_of_rank(rank: int, *values: Any) -> Any:
    return values[min(rank, len(values) - 1)]
