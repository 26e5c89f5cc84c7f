"""Private names of torch, and differences of its versions: only this file and `simulation` import them from torch.

All names here were seen in torch 2.13.

torch 2.11, the oldest that meshdiff runs on, against 2.13:

- `nn.Linear` of a DTensor whose sequence is sharded raises if the batch is above 1: it flattens both
  ("Attempted to flatten multiple dimensions"). Weights that are put on a mesh take shards by `linear.on_shards`.
- The all-gather of functional collectives has another name: `all_gather`.
- `LaunchConfig` has no `shutdown_timeout`: `known` leaves it out, and ranks that do not end when they
  are told to are killed after 30 seconds and not after 10.

One difference needs no code here: on a mesh of one rank, 2.11 may return `Replicate()` for `Shard(1)`, for
instance from `replicated * sharded`; on such a mesh attention treats the two alike on every version.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, overrides
from torch._ops import HigherOrderOperator, OpOverload
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_structure, tree_unflatten

__all__ = [
    "OPAQUE_ATTENTION",
    "UNCOMPILED",
    "AsyncCollectiveTensor",
    "DTensorSpec",
    "DisableTorchDispatch",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "HigherOrderOperator",
    "Modes",
    "OpOverload",
    "TensorMeta",
    "TorchDispatchMode",
    "TreeSpec",
    "all_gather",
    "autograd_task",
    "current_dispatch_mode",
    "default_store",
    "disabled_torch_function",
    "dispatch_depth",
    "funcol",
    "has_torch_dispatch",
    "is_traceable_wrapper_subclass",
    "known",
    "make_subclass",
    "make_wrapper_subclass",
    "mode_stacks",
    "process_group",
    "replace_mode_stacks",
    "saving_hooks",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_structure",
    "tree_unflatten",
    "uncompiled",
    "with_timeout_of_world",
    "without_compiling",
]

DisableTorchDispatch = torch._C._DisableTorchDispatch
DisableTorchFunction = torch._C.DisableTorchFunction
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
current_dispatch_mode = _python_dispatch._get_current_dispatch_mode
dispatch_depth = torch._C._len_torch_dispatch_stack
autograd_task = torch._C._current_graph_task_id
"""The function that returns the number of the running backward pass; -1 if none runs."""
default_store = distributed_c10d._get_default_store
disabled_torch_function = torch._C._disabled_torch_function_impl
make_subclass = Tensor._make_subclass
make_wrapper_subclass = Tensor._make_wrapper_subclass
OPAQUE_ATTENTION = (torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd)
"""Functions inside which torch computes attention that no mode intercepts."""
process_group = distributed_c10d._resolve_process_group
"""The function that returns the process group of a name, as in the arguments of collectives."""

all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


def saving_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The two functions of the `torch.autograd.graph.saved_tensors_hooks` that are on, if any are."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def known(config: type, **options: Any) -> dict[str, Any]:
    """The options that the dataclass has, of those that are given."""
    return {name: options[name] for name in options.keys() & {field.name for field in dataclasses.fields(config)}}


def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that torch.compile is not to trace, nor what it calls.

    `torch.compiler.disable` takes seconds to import, so it is used only where dynamo is loaded already.
    """
    global _disabled
    if "torch._dynamo" not in sys.modules:
        return function(*args, **kwargs)
    if _disabled is None:
        _disabled = torch.compiler.disable(_call, reason=UNCOMPILED)
    return _disabled(function, *args, **kwargs)


UNCOMPILED = "it is on a mesh; compile what each rank runs instead: meshdiff.parallelize(..., capture=torch.compile)"
_disabled: Callable[..., Any] | None = None


def without_compiling() -> AbstractContextManager[Any]:
    """Run compiled code eagerly in the body: dynamo cannot trace code that runs under our modes."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def with_timeout_of_world(mesh: DeviceMesh) -> DeviceMesh:
    """Give the groups of a mesh the time-out of the group of all ranks; torch gives them half an hour.

    It uses private functions, as `init_device_mesh` takes no time-out. Torch has them for gloo and nccl; with other
    backends groups keep torch's time-out.
    """
    backend: Any = distributed_c10d._get_default_group()._get_backend(torch.device(mesh.device_type))
    if backend.name() in ("gloo", "nccl"):
        for group in mesh.get_all_groups():
            distributed_c10d._set_pg_timeout(backend.options._timeout, group)
    return mesh


Modes = tuple[tuple[Any, ...], tuple[Any, ...]]


def mode_stacks() -> Modes:
    """The active modes of torch functions, and those of operations, the outermost first."""
    functions = tuple(overrides._get_current_function_mode_stack())
    return functions, tuple(_python_dispatch._get_current_dispatch_mode_stack())


def replace_mode_stacks(old: Modes, new: Modes) -> None:
    """Replace the active modes `old` by `new`."""
    modules: tuple[Any, Any] = overrides, _python_dispatch
    for place, own in enumerate(modules):
        for _ in old[place]:
            own._pop_mode()
        for mode in new[place]:
            own._push_mode(mode)


def has_torch_dispatch(kind: Any) -> bool:
    """True if a class of tensors runs operations itself."""
    return bool(kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl)
