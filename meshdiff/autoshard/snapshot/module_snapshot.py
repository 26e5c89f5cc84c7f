"""A module as it is at one time: to see later whether it has changed, and to put it back.

It has all that can be reached from its modules by attributes, containers,
objects, hooks, methods and the variables that functions enclose, and the
globals and attributes of modules and classes that the forwards name. Small
values count by value, containers by what they hold, other objects by identity,
and tensors as the policy says. Where their values count, weights and arrays
count by a few of them, because a write to `weight.data` leaves no other trace.
An iterator, whose position cannot be read, counts as another one every time.

Not seen are changes inside of objects that are made in C, of objects of other
packages that only a global holds, of files and clocks; `Policy` has what else
some uses do without.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from meshdiff.autoshard.patching import original_class, set_class
from meshdiff.autoshard.snapshot.generators import default_generators, set_state, state_of
from meshdiff.autoshard.snapshot.holders import LITTLE, grew, holds, put_back
from meshdiff.autoshard.snapshot.policy import Policy
from meshdiff.autoshard.snapshot.walk import Walk, version
from meshdiff.autoshard.snapshot.weight_samples import WeightSamples
from meshdiff.distributed.torch_compat import tree_leaves

__all__ = ["ModuleSnapshot", "Unrestorable"]

RANDOM = "random numbers"


class Unrestorable(Exception):
    """Something was written to of which no copy was kept; the text is its name."""


class ModuleSnapshot:
    """All that can be reached of a module, as it is now.

    Args:
        module: the module.
        policy: what counts, and what can be undone.
        arguments: any structure of tensors that belongs to it.
    """

    def __init__(self, module: nn.Module, policy: Policy = Policy.STATE, arguments: Any = ()) -> None:
        self.module, self.policy, self.arguments = module, policy, arguments
        self._walk = Walk(module, policy)
        self._parts = self._walk.parts
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor):
                self._walk.add_tensor(tensor, "its inputs")
        self._random: list[tuple[Any, Any]] = []
        self._samples, self._copies = WeightSamples([]), dict[int, Tensor]()
        if policy is Policy.GUARD:
            return
        self._note_random()
        self._samples = WeightSamples(self._walk.weights)
        with torch.no_grad():
            self._copies = {
                key: tensor.clone()
                for key, (_, tensor, _) in self._walk.tensors.items()
                if (policy is Policy.RESTORE or tensor.numel() <= LITTLE)
                and not isinstance(tensor, nn.Parameter)
                and not (tensor.is_quantized or tensor.is_nested)  # which torch clones in part only
            }

    @property
    def opaque(self) -> str:
        """Name and type of an attribute that cannot be seen into, of a `GUARD`; "" if there is none."""
        return self._walk.opaque

    def retake(self) -> ModuleSnapshot:
        """The module as it is now, to be compared; this snapshot itself if nothing has changed, which is found faster.

        Of a `RESTORE`, it has no more copies than a `STATE`.
        """
        if not self._walk.is_current() or not self._samples.still():
            policy = Policy.STATE if self.policy is Policy.RESTORE else self.policy
            return ModuleSnapshot(self.module, policy, self.arguments)
        if all(state_of(source) == state for source, state in self._random):
            return self
        now = copy.copy(self)  # random numbers were drawn, as many schedulers do between steps
        now._note_random()
        return now

    def _note_random(self) -> None:
        """The state of the generators that everything draws from by default."""
        self._random = [(source, state_of(source)) for source in default_generators()]
        self._parts = {**self._parts, RANDOM: {str(i): state for i, (_, state) in enumerate(self._random)}}

    def diff(self, now: ModuleSnapshot, drawn: bool = True) -> str:
        """The name of something that is another one in `now`; "" if nothing is.

        Args:
            now: of the same module and policy, or of `STATE` and `RESTORE`.
            drawn: count random numbers that were drawn from the default generators.
        """
        if now is self:
            return ""
        differing = self._differing(now, None if drawn else RANDOM) if self._parts != now._parts else ""
        return differing or self._written(now)

    def only_grew(self, now: ModuleSnapshot) -> bool:
        """True if nothing that was there is another one in `now`, as when a result is kept for later calls."""
        return grew(self._parts, now._parts) and not self._written(now)

    def restore(self, now: ModuleSnapshot) -> None:
        """Put back what differs in `now`, which was just taken.

        Raises:
            Unrestorable: if something was written to of which there is no copy; nothing is put back then.
            ValueError: of a `GUARD`, which has no copies.
        """
        if self.policy is Policy.GUARD:
            raise ValueError("a guard has no copies to restore from")
        if now is self:
            return
        written = self._written(now, self._copies)
        if written:
            raise Unrestorable(written)
        for holder, content in self._walk.contents:
            if not holds(holder, content):
                put_back(holder, content)
        for holder, content in self._walk.long:
            if len(holder) != len(content):
                put_back(holder, content)
        self._walk.empty_again()
        for part, cls in self._walk.modules.items():
            if original_class(part) is not getattr(cls, "_meshdiff_base", cls):
                set_class(part, cls)
        for source, state in (*self._walk.generators, *self._random):
            if state_of(source) != state:
                set_state(source, state)
        differing = self._samples.differing(now._samples)
        for key, values in self._copies.items():
            _, tensor, before = self._walk.tensors[key]
            if tensor.is_inference() or version(tensor) != before or key in differing:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.detach().copy_(values)

    def _written(self, now: ModuleSnapshot, without: Any = ()) -> str:
        """The name of a tensor that was written to, other than those."""
        for key, (name, _, before) in self._walk.tensors.items():
            if key not in without and now._walk.tensors.get(key, ("", None, before))[2] != before:
                return name
        return "values of weights" if self._samples.differing(now._samples) - set(without) else ""

    def _differing(self, now: ModuleSnapshot, without: str | None) -> str:
        for name in [*self._parts, *now._parts]:
            own, other = self._parts.get(name, {}), now._parts.get(name, {})
            if name == without or own == other:
                continue
            for key in [*own, *other]:
                if own.get(key, ...) != other.get(key, ...):
                    return f"{name}.{key}".lstrip(".")
            return f"{name}, the order of its attributes".lstrip("., ")
        return ""
