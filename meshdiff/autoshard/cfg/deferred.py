"""A tensor of a call that has not run yet, which is of use to whoever takes a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshdiff.distributed.simulation import outside
from meshdiff.distributed.torch_compat import (
    DisableTorchFunctionSubclass,
    TreeSpec,
    make_subclass,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
    uncompiled,
)

__all__ = ["DeferredTensor", "OutputForm"]


@dataclass(frozen=True)
class OutputForm:
    """The form of what a call returns, without the values.

    Attributes:
        structure: tuples, dicts and output objects, as pytree has them.
        tensors: shape and dtype of each leaf; None for a leaf that is None.
        device: of the tensors.
    """

    structure: TreeSpec
    tensors: tuple[tuple[torch.Size, torch.dtype] | None, ...]
    device: torch.device | None

    @staticmethod
    def of(output: Any) -> OutputForm | None:
        """The form of an output; None if it holds something else than dense tensors of one device."""
        leaves, structure = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in tensors}
        strided = all(tensor.layout == torch.strided and not tensor.is_nested for tensor in tensors)
        if len(devices) != 1 or not strided or not all(isinstance(leaf, Tensor) or leaf is None for leaf in leaves):
            return None
        forms = tuple(None if leaf is None else (leaf.shape, leaf.dtype) for leaf in leaves)
        return OutputForm(structure, forms, devices.pop())

    @staticmethod
    def tensors_of(output: Any) -> list[Tensor]:
        """The tensors of an output, in their order."""
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """An output of this form."""
        left = iter(tensors)
        return tree_unflatten([None if form is None else next(left) for form in self.tensors], self.structure)

    def deferred(self, compute: Callable[[], Any]) -> Any:
        """An output of this form whose tensors are `DeferredTensor`; `compute` gives the real one."""
        tensors = [
            None if form is None else DeferredTensor(*form, _Leaf(compute, place))
            for place, form in enumerate(self.tensors)
        ]
        return tree_unflatten(tensors, self.structure)


@dataclass(frozen=True)
class _Leaf:
    """One tensor of an output."""

    compute: Callable[[], Any]
    place: int

    def __call__(self) -> Tensor:
        return tree_leaves(self.compute())[self.place]


class DeferredTensor(Tensor):
    """A tensor that is not computed yet; any use computes it.

    Operations see it by `__torch_function__`, and those in C++ that do not call
    it by `__torch_dispatch__`. Once computed it is a plain tensor
    itself (`become`), so that nothing that comes later has to know of it.

    Args:
        shape, dtype: of the tensor.
        compute: computes it.
    """

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, compute: Callable[[], Tensor]) -> DeferredTensor:
        with outside():
            # Without memory, as FakeTensor of torch: what takes that without asking (`other.data = deferred`) raises.
            memory = torch.empty(shape, dtype=dtype, device="meta")
            tensor = make_subclass(cls, memory, dispatch_device=True)
        tensor._compute = compute
        return tensor

    def become(self, computed: Tensor) -> bool:
        """Be an alias of that tensor from now on, class and all, where torch can do that."""
        try:
            alias = computed.detach()  # `computed` may be somebody's, an input that is returned say
            with DisableTorchFunctionSubclass():
                torch.utils.swap_tensors(self, alias)
        except (RuntimeError, TypeError):  # a weak reference to either, or slots
            return False
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(DeferredTensor, _computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch has it without the types of arguments
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(DeferredTensor, _computed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _computed(deferred: DeferredTensor) -> Tensor:
    try:
        return uncompiled(deferred._compute)
    except TypeError as error:
        # Python takes it for an operand that is not supported, and says that instead.
        raise RuntimeError(f"the call that was to compute this tensor failed: {error}") from error
