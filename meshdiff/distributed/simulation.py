"""Simulation of many ranks in one process: the same program, run for every rank in turn.

Built on torch's `LocalTensorMode`, in which a tensor holds one value per rank
and collectives move data between those values. That is private API of torch:
this file is the only one that imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.distributed._local_tensor import (
    LocalTensor,
    LocalTensorMode,
    enabled_local_tensor_mode,
    maybe_run_for_local_tensor,
)
from torch.distributed.tensor import DTensor

# Registers the process group backend that sends nothing.
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["holds_all_ranks", "is_simulated", "largest", "on_each_rank", "outside", "rank_values", "simulate", "unwrap"]

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def simulate(world_size: int) -> Iterator[None]:
    """Run the body as `world_size` ranks would, in this process.

    Inside, build a mesh with `meshdiff.init_mesh` as usual. Tensors made inside
    hold one value per rank; `unwrap` takes out a value that all ranks share.

    Example:
        >>> with simulate(8):
        ...     mesh = init_mesh(Layout(cfg=2, cp=4))
        ...     # what 8 processes would run

    Raises:
        RuntimeError: if `torch.distributed` is already started in this process.
    """
    if dist.is_initialized():
        raise RuntimeError("simulate() needs a process in which torch.distributed has not been started")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with LocalTensorMode(world_size), _WritesOnce():
            yield
    finally:
        dist.destroy_process_group()


class _WritesOnce(TorchDispatchMode):
    """A mode in which a write to a tensor from outside the simulation, which all ranks have in common, is done once.

    torch would repeat the write for each rank, so that an in-place addition would be applied once per rank.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        mutable = not isinstance(func, HigherOrderOperator) and func._schema.is_mutable
        if not mutable or LocalTensor not in types or not args or isinstance(args[0], (LocalTensor, list, tuple)):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(LocalTensor, unwrap, (args, kwargs))
        with outside():
            return func(*args, **kwargs)


def is_simulated() -> bool:
    """True if the ranks of this process's process group are simulated."""
    return dist.is_initialized() and dist.get_backend() == "fake"


def holds_all_ranks() -> bool:
    """True if a tensor that is made here has a value for each rank, as in the body of `simulate`."""
    return enabled_local_tensor_mode() is not None


def on_each_rank(function: Callable[P, R]) -> Callable[P, R]:
    """Call `function` with the plain tensors and integers of one rank at a time in a simulation.

    Everywhere else the function runs as it is. It must not call collectives.
    Needed wherever a shape or an index depends on the rank. A function that
    returns a tensor, or a tuple of them, stays differentiable.
    """
    per_rank = _per_rank(function)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not holds_all_ranks():
            return function(*args, **kwargs)
        differentiate = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if not differentiate:
            return per_rank(*args, **kwargs)
        return _OnEachRank.apply(partial(function, **kwargs), *args)

    return run


def _per_rank(function: Callable[P, R]) -> Callable[P, R]:
    """Apply torch's own decorator, which takes plain functions only, to partial functions as well."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    return maybe_run_for_local_tensor(call)


class _OnEachRank(torch.autograd.Function):
    """A function with its own backward pass, as autograd does not record operations inside a simulated tensor."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        ctx.function = function
        ctx.others = [None if isinstance(arg, Tensor) else arg for arg in args]
        ctx.tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.tensors))
        return _per_rank(function)(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i in ctx.tensors if ctx.needs_input_grad[i + 1]]

        @_per_rank
        def input_gradients(gradients: tuple[Tensor, ...], *args: Any) -> tuple[Tensor, ...]:
            # A torch function mode of the caller has had its say in the forward pass.
            with torch.enable_grad(), torch._C.DisableTorchFunction():
                args = tuple(
                    arg.detach().requires_grad_(i in wanted) if isinstance(arg, Tensor) else arg
                    for i, arg in enumerate(args)
                )
                outputs = ctx.function(*args)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.autograd.grad(outputs, [args[i] for i in wanted], gradients, materialize_grads=True)

        args = list(ctx.others)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor
        found = dict(zip(wanted, input_gradients(gradients, *args), strict=True))
        return None, *(found.get(i) for i in range(len(args)))


@contextmanager
def outside() -> Iterator[None]:
    """Run the body once for all ranks of a simulation, so that it makes plain tensors; elsewhere, run it as it is.

    For work that is the same on every rank, such as reading a file.
    """
    mode = enabled_local_tensor_mode()
    with nullcontext() if mode is None else mode.disable():
        yield


def rank_values(tensor: Tensor) -> list[Tensor]:
    """Every simulated rank's value of `tensor`, in the order of ranks; of a plain tensor, itself."""
    if isinstance(tensor, LocalTensor):
        return [tensor._local_tensors[rank] for rank in sorted(tensor._local_tensors)]
    return [tensor]


def unwrap(tensor: Tensor) -> Tensor:
    """The one value that all simulated ranks agree on; plain tensors pass through.

    Raises:
        AssertionError: if ranks hold different values.
    """
    return tensor.reconcile() if isinstance(tensor, LocalTensor) else tensor


def largest(number: int | torch.SymInt) -> int:
    """The largest of an integer's values over simulated ranks; a plain integer is itself."""
    per_rank = getattr(getattr(number, "node", None), "_local_ints", None)
    return int(number) if per_rank is None else max(per_rank.values())
