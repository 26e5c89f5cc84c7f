"""The stand-in, in a module, of a weight that is stored elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meshdiff.distributed.torch_compat import disabled_torch_function, make_wrapper_subclass, tree_map_only

__all__ = ["ELSEWHERE", "ReleasedWeight", "in_memory_order"]

ELSEWHERE = "is divided between ranks or in host memory; change the model before that, or remove() it first"


def in_memory_order(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The values of a tensor `[elements]` as they lie in memory, and the strides that make the tensor of them.

    A view, unless there are gaps between the values or several are in one place; then the values in the order of a
    contiguous tensor.
    """
    tensor = tensor.resolve_conj().resolve_neg()
    strides = tensor.stride()
    permuted = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -strides[dim]))
    if permuted.is_contiguous():
        return permuted.reshape(-1), strides
    return tensor.contiguous().view(-1), tensor.contiguous().stride()


class ReleasedWeight(Tensor):
    """A weight while it is stored elsewhere, with the shape, dtype and device that it has while it is used.

    An operation on it fetches all weights that are stored with it, for this operation alone: a collective, if ranks
    store a part each. It cannot be written to, nor trained.

    Args:
        weight: the weight itself.
        device: where modules run.
        fetch: function that returns the weight's values.
    """

    fetch: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, weight: Tensor, device: torch.device, fetch: Callable[[], Tensor]) -> ReleasedWeight:
        stride = in_memory_order(weight)[1]
        made = make_wrapper_subclass(cls, weight.shape, strides=stride, dtype=weight.dtype, device=device)
        made.fetch, made._is_param = fetch, True
        return made

    def __init__(self, weight: Tensor, device: torch.device, fetch: Callable[[], Tensor]) -> None:
        pass

    __torch_function__: Any = disabled_torch_function  # results are no released weights

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch has it without the types of arguments
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} writes to a weight that {ELSEWHERE}")
        args, kwargs = tree_map_only(cls, lambda released: released.fetch(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch has no type for it
        return f"ReleasedWeight({list(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return nn.Parameter(self.fetch().clone(), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(f"this would save a weight that {ELSEWHERE}")

    def share_memory_(self) -> ReleasedWeight:
        raise RuntimeError(f"this would share the memory of a weight that {ELSEWHERE}")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"this would hand out the memory of a weight that {ELSEWHERE}")

    def requires_grad_(self, requires_grad: bool = True) -> ReleasedWeight:
        if requires_grad:
            raise RuntimeError(f"this would train a weight that {ELSEWHERE}")
        return self


def _refuse_data(released: ReleasedWeight, value: Tensor) -> None:
    if value is not released:  # which it is when a module is moved to where it is
        raise RuntimeError(f"`.data = ` would change a weight that {ELSEWHERE}")


def _refuse_gradients(released: ReleasedWeight, value: bool) -> None:
    released.requires_grad_(value)


# Not in the body of the class, where torch declares them to be attributes.
setattr(ReleasedWeight, "data", property(lambda released: released, _refuse_data))  # noqa: B010
setattr(ReleasedWeight, "requires_grad", property(lambda released: False, _refuse_gradients))  # noqa: B010
