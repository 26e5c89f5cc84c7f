"""Putting a model that somebody else wrote on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.strategy import AUTO
from meshdiff.autoshard.capture.graph_capture import Backend
from meshdiff.autoshard.parallelized import Parallelized
from meshdiff.distributed.mesh import ranks_of_replica
from meshdiff.distributed.weight_streaming import Storage

__all__ = ["parallelize", "storage_of"]


def parallelize(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: list[str] | None = None,
    dim: int | None = None,
    strategy: str = AUTO,
    verify: bool = False,
    capture: bool | Backend = False,
    shard_weights: bool | DeviceMesh = False,
    offload: bool = False,
    aside: Callable[[Any, Any], bool] | None = None,
) -> Parallelized:
    """Put a model on a mesh, as it is: from now on every call of it is sharded over the ranks.

    Its code and weights stay as they are; weights are replicated, unless
    `shard_weights` or `offload` says otherwise. Every rank calls it with the
    same plain tensors and gets the same plain tensors back; every parameter's
    `.grad` gets the full gradient. At the entry of each block the tokens become
    a DTensor that is sharded over the sequence. Operations
    that are not known to be right on shards run on replicated tensors, the same
    on every rank: that costs time, and `report()` names the places.

    The first call for each set of shapes finds out what runs how: it is slower,
    and if something has to be taken back, the call starts again from its inputs.

    Args:
        module: any model; transformers gain most.
        mesh: a 1-D mesh, `mesh["cp"]` say.
        blocks: names of the submodules at whose entry tokens become shards;
            by default the members of the module's lists of blocks.
        dim: the dim of the blocks' first tensor to shard, instead of the sequence: -2, the height, for decoders and
            encoders of images and videos `[batch, channels, (frames,) height, width]`, -1 for sound. Blocks are then
            all modules with convolutions in them, whose rows come with a halo. Tensors in which it does not come after
            batch and channels stay replicated.
        strategy: of mesh attention, see `meshdiff.mesh_attention`.
        verify: compare the first call for each set of shapes with the untouched
            model's, on every rank, and raise if they differ.
        capture: run calls that have settled, under `torch.no_grad()`, as graphs:
            the operations and collectives of one rank, without the Python that
            led there, see `meshdiff.autoshard.capture.graph_capture`. True runs them as they
            are; a function of a `torch.fx.GraphModule` makes of it what is run,
            `torch.compile` say. What the model's Python reads besides its arguments, its
            attributes and the globals that it names (a clock, a file) stays as it was.
        shard_weights: each rank stores a part of every block's weights, and of every large module's outside of
            blocks, and gathers them right before they are used, those of the next block while a block runs
            (`meshdiff.autoshard.stored_weights`). True divides between the ranks of `mesh`; a mesh, as `init_mesh`
            makes it, between all ranks of this rank's replica, which then have to call the module together.
        offload: store them in host memory (pinned, for a GPU) and copy them to the device in the same way.
        aside: a function of the args and kwargs of a call, the same on every rank; where it returns True, every rank
            does all of the call.

    Returns:
        A handle: `report()` describes the last new call, `graphs` has what
        was captured, `weights` says what is stored where, `remove()` takes the module off the mesh again.

    Raises:
        ValueError: for a mesh with more than one dim, a compiled module, blocks that do not exist,
            `capture` in a simulation, where one graph would have to be every rank's, or together with
            `shard_weights` or `offload`, for a graph refers to weights by where they are; and if ranks have
            different weights to divide.
    """
    storage = storage_of(mesh, shard_weights, offload)
    return Parallelized(
        module,
        mesh,
        blocks=blocks,
        dim=dim,
        strategy=strategy,
        verify=verify,
        capture=capture,
        storage=storage,
        aside=aside,
    )


def storage_of(mesh: DeviceMesh, shard_weights: bool | DeviceMesh, offload: bool) -> Storage | None:
    """The place of the weights; None if they stay where they are."""
    divided = shard_weights if isinstance(shard_weights, DeviceMesh) else mesh if shard_weights else None
    if divided is not None and divided.ndim > 1:
        divided = ranks_of_replica(divided)
    if divided is not None and divided.size() == 1:
        divided = None
    if divided is None and not offload:
        return None
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    return Storage(device, divided=divided, on_host=offload)
