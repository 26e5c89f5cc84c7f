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

from meshdiff.attention.choice import AUTO
from meshdiff.attention.drop_in import sharded_attention
from meshdiff.attention.local import to_shard
from meshdiff.mesh import replicate_module
from meshdiff.placements import SEQUENCE

__all__ = ["ContextParallel"]


class ContextParallel(ParallelStyle):
    """A module that calls `F.scaled_dot_product_attention` works on a shard of the sequence.

    Its parameters become replicated DTensors, its first input `[batch, seq, ...]`
    a DTensor sharded over the sequence, and its attention `mesh_attention`.

    Args:
        input_layouts: what a plain first input is: `Shard(1)`, this rank's part of
            `torch.chunk(whole, N, dim=1)`, or `Replicate()`, the whole on every rank.
        output_layouts: what the output is to be: `Shard(1)`, or `Replicate()` at
            the price of one all-gather.
        use_local_output: return a plain tensor, as the rest of an untouched model expects.
        seq_len: the length of the whole sequence; needed for plain `Shard(1)` inputs.
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
        def sharded(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            with sharded_attention(strategy=self.strategy):
                output = forward(self._sequence(x, device_mesh), *args, **kwargs)
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
        whole = torch.empty(x.shape[0], self.seq_len, *x.shape[2:], device="meta")
        return DTensor.from_local(x, mesh, [SEQUENCE], run_check=False, shape=whole.shape, stride=whole.stride())
