"""What older versions of torch lack, and what does it for them; on newer ones nothing here changes anything.

torch 2.11, the oldest that meshdiff runs on, against 2.13:

- `nn.Linear` of a DTensor whose sequence is sharded raises if the batch is above 1: it flattens both
  ("Attempted to flatten multiple dimensions"). Weights that are put on a mesh take shards by `on_shards`.
- The all-gather of functional collectives has another name: `all_gather`.
- `LaunchConfig` has no `shutdown_timeout`: `known` leaves it out, and ranks that do not end when they
  are told to are killed after 30 seconds and not after 10.

One difference has nothing here, because what answers it is true of every version: where the mesh has one
rank, 2.11 may call `Replicate()` what was `Shard(1)`, in `replicated * sharded` say, and attention takes one
for the other there.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.distributed.local_shards import contiguous_stride, to_shard, wrap
from meshdiff.distributed.placements import REPLICATED
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["all_gather", "known", "on_shards", "uncompiled", "with_timeout_of_world", "without_compiling"]

LINEAR_TAKES_SHARDS = torch.__version__ >= "2.13"  # which compares numbers

all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


def known(config: type, **options: Any) -> dict[str, Any]:
    """Those of the options that the dataclass has."""
    return {name: options[name] for name in options.keys() & {field.name for field in dataclasses.fields(config)}}


def uncompiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that torch.compile is not to trace, nor what it calls.

    `torch.compiler.disable` takes seconds to import, which where nothing is compiled nobody has to wait for.
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
    """What is compiled runs as it was in the body: dynamo cannot trace code that runs under modes of ours."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def with_timeout_of_world(mesh: DeviceMesh) -> DeviceMesh:
    """Let the groups of a mesh wait for as long as that of all ranks does; torch gives them half an hour.

    By private functions: `init_device_mesh` takes no time-out (seen in torch 2.11 and 2.13).
    """
    if dist.get_backend() != "fake":
        world = dist.group.WORLD._get_backend(torch.device(mesh.device_type))  # type: ignore[union-attr]
        for group in mesh.get_all_groups():
            distributed_c10d._set_pg_timeout(world.options._timeout, group)
    return mesh


def on_shards(module: nn.Module) -> nn.Module:
    """Let every `nn.Linear` inside `module` take DTensors of whatever batch, in place; its weights are to be DTensors.

    Not those of a class of their own, which may do something else.
    """
    if not LINEAR_TAKES_SHARDS:
        for child in module.modules():
            if type(child) is nn.Linear:
                child.__class__ = _LinearOnShards
    return module


class _LinearOnShards(nn.Linear):
    """A linear layer for which each rank needs nothing but its shard, and which tells DTensor so."""

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, DTensor) or input.device_mesh.ndim > 1 or not isinstance(self.weight, DTensor):
            return super().forward(input)
        (placement,), mesh = input.placements, input.device_mesh
        flattened = placement.is_shard() and 0 < placement.dim < input.ndim - 1  # type: ignore[attr-defined]
        if not flattened or self.weight.placements != (REPLICATED,):
            return super().forward(input)
        shape = torch.Size((*input.shape[:-1], self.out_features))
        weights = [to_shard(tensor) for tensor in (self.weight, self.bias) if tensor is not None]
        return wrap(_linear(to_shard(input), *weights), mesh, placement, shape, contiguous_stride(shape))


@on_each_rank
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias)
