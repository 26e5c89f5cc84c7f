"""Putting a model that somebody else wrote on a mesh."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.strategy import AUTO
from meshdiff.autoshard.capture.graph_capture import Backend
from meshdiff.autoshard.parallelized import Parallelized

__all__ = ["parallelize"]


def parallelize(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: list[str] | None = None,
    strategy: str = AUTO,
    verify: bool = False,
    capture: bool | Backend = False,
) -> Parallelized:
    """Put a model on a mesh, as it is: from now on every call of it is sharded over the ranks.

    Its code and weights stay as they are; weights are replicated. Every rank
    calls it with the same plain tensors and gets the same plain tensors back;
    every parameter's `.grad` gets the full gradient. At the entry of each block
    the tokens become a DTensor that is sharded over the sequence. Operations
    that are not known to be right on shards run on replicated tensors, the same
    on every rank: that costs time, and `report()` names the places.

    The first call for each set of shapes finds out what runs how: it is slower,
    and if something has to be taken back, the call starts again from its inputs.

    Args:
        module: any model; transformers gain most.
        mesh: a 1-D mesh, `mesh["cp"]` say.
        blocks: names of the submodules at whose entry tokens become shards;
            by default the members of the module's lists of blocks.
        strategy: of mesh attention, see `meshdiff.mesh_attention`.
        verify: compare the first call for each set of shapes with the untouched
            model's, on every rank, and raise if they differ.
        capture: run calls that have settled, under `torch.no_grad()`, as graphs:
            the operations and collectives of one rank, without the Python that
            led there, see `meshdiff.autoshard.capture.graph_capture`. True runs them as they
            are; a function of a `torch.fx.GraphModule` makes of it what is run,
            `torch.compile` say. What the model's Python reads besides its arguments, its
            attributes and the globals that it names (a clock, a file) stays as it was.

    Returns:
        A handle: `report()` describes the last new call, `graphs` has what
        was captured, `remove()` takes the module off the mesh again.

    Raises:
        ValueError: for a mesh with more than one dim, a compiled module, blocks that do not exist, or
            `capture` in a simulation, where one graph would have to be every rank's.
    """
    return Parallelized(module, mesh, blocks=blocks, strategy=strategy, verify=verify, capture=capture)
