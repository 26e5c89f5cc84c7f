"""Mesh attention in torch's own way of making a model parallel, `parallelize_module`."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from meshdiff.attention.problem import chunk_sizes
from meshdiff.attention.sdpa_mode import sharded_attention
from meshdiff.attention.strategy import AUTO
from meshdiff.distributed.local_shards import to_shard
from meshdiff.distributed.mesh import replicate_module
from meshdiff.distributed.placements import SEQUENCE
from meshdiff.distributed.simulation import on_each_rank

__all__ = ["ContextParallel"]


class ContextParallel(ParallelStyle):
    """A module that calls `F.scaled_dot_product_attention` works on a shard of the sequence.

    Its parameters become replicated DTensors, its first input `[batch, seq, ...]`
    a DTensor sharded over the sequence, other tensors replicated ones (a text to
    attend to, say), and its attention `mesh_attention`.

    Args:
        input_layouts: what a plain first input is: `Shard(1)`, this rank's part of
            `torch.chunk(whole, N, dim=1)`, or `Replicate()`, the full input.
        output_layouts: what the output is to be: `Shard(1)`, or `Replicate()` at
            the price of one all-gather.
        use_local_output: return a plain tensor, as the rest of an untouched model expects.
        seq_len: the length of the full sequence; needed for plain `Shard(1)` inputs.
        strategy: see `mesh_attention`.

    Raises:
        ValueError: for other layouts; in the forward pass, for a plain shard without
            `seq_len`, or one of another length than its part of it.

    Example:
        >>> whole = ContextParallel(input_layouts=Replicate(), output_layouts=Replicate())
        >>> parallelize_module(model, mesh["cp"], {"blocks.*.attn": whole})
    """

    def __init__(
        self,
        *,
        input_layouts: Placement = SEQUENCE,
        output_layouts: Placement = SEQUENCE,
        use_local_output: bool = True,
        seq_len: int | None = None,
        strategy: str = AUTO,
    ) -> None:
        super().__init__()
        for name, layout in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
            if layout not in (SEQUENCE, Replicate()):
                raise ValueError(f"{name}={layout} given; ContextParallel takes Shard(1) or Replicate()")
        self.input_layouts, self.output_layouts = input_layouts, output_layouts
        self.use_local_output, self.seq_len, self.strategy = use_local_output, seq_len, strategy

    def __repr__(self) -> str:
        return (
            f"ContextParallel(input_layouts={self.input_layouts}, output_layouts={self.output_layouts}, "
            f"use_local_output={self.use_local_output}, seq_len={self.seq_len}, strategy={self.strategy!r})"
        )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(f'ContextParallel takes a 1-D mesh, mesh["cp"] say; given {device_mesh.mesh_dim_names}')
        replicate_module(module, device_mesh)
        forward = module.forward

        # Hooks before and after could not keep the mode to this module when its forward raises.
        @wraps(forward)
        def sharded(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            first = next((i for i, arg in enumerate(given) if isinstance(arg, Tensor)), None)
            if first is None:
                raise ValueError(f"{type(module).__name__} was called without a tensor to divide")
            placed = [
                self._sequence(arg, device_mesh) if i == first else _whole(arg, device_mesh)
                for i, arg in enumerate(given)
            ]
            with sharded_attention(strategy=self.strategy):
                output = forward(*placed[: len(args)], **dict(zip(kwargs, placed[len(args) :], strict=True)))
            if not isinstance(output, DTensor):
                raise ValueError(f"{type(module).__name__} was given a DTensor and returned {type(output).__name__}")
            output = output.redistribute(placements=[self.output_layouts])
            if not self.use_local_output:
                return output
            # What follows runs on every rank alike, and so does its gradient: the whole of it, not a share.
            return output.to_local() if self.output_layouts == Replicate() else to_shard(output)

        module.forward = sharded
        return module

    def _sequence(self, x: Tensor, mesh: DeviceMesh) -> DTensor:
        """The first input as a DTensor sharded over the sequence."""
        if isinstance(x, DTensor):
            return x.redistribute(placements=[SEQUENCE])
        if self.input_layouts == Replicate():
            return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[SEQUENCE])
        if self.seq_len is None:
            raise ValueError("a plain Shard(1) input does not tell the whole length; ContextParallel(seq_len=...) does")
        _check_length(x, self.seq_len, mesh.size(), mesh.get_local_rank())
        whole = torch.empty(x.shape[0], self.seq_len, *x.shape[2:], device="meta")
        return DTensor.from_local(x, mesh, [SEQUENCE], run_check=False, shape=whole.shape, stride=whole.stride())


def _whole(arg: Any, mesh: DeviceMesh) -> Any:
    """Another input, such as a text, as a replicated DTensor if it is a plain tensor."""
    if isinstance(arg, Tensor) and not isinstance(arg, DTensor):
        return DTensor.from_local(arg, mesh, [Replicate()], run_check=False)
    return arg


@on_each_rank
def _check_length(x: Tensor, seq_len: int, ranks: int, rank: int) -> None:
    sizes = chunk_sizes(seq_len, ranks)
    if x.shape[1] != sizes[rank]:
        raise ValueError(
            f"rank {rank} was given {x.shape[1]} of seq_len={seq_len} tokens; over {ranks} ranks its part is "
            f"{sizes[rank]}, as torch.chunk(whole, {ranks}, dim=1) divides them"
        )
