"""The device mesh: the ranks that share a sequence, and those that share a guidance step.

A mesh has *dims* named `cfg` and `cp`; ranks of one `cp` group are neighbours,
so that the all-to-alls of attention stay inside a node and only the one
all-gather of guidance crosses nodes. Many requests add an outer dim `dp`, of
replicas, which send each other nothing.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from meshdiff.distributed.linear import on_shards
from meshdiff.distributed.torch_compat import with_timeout_of_world
from meshdiff.distributed.world import init_distributed, keep_order_of_sums, launched_world_size
from meshdiff.errors import InputError

__all__ = [
    "Layout",
    "check_gpus",
    "from_first_rank",
    "groups_within",
    "init_distributed",
    "init_mesh",
    "launched_world_size",
    "on_mesh",
    "place",
    "ranks_of_replica",
    "replica",
    "replicate_buffers",
    "replicate_module",
    "ring_of_groups",
    "torchrun_command",
]

DP, CFG, CP = "dp", "cfg", "cp"

DOUBLING = 0.95
"""Efficiency of each rank after the number of ranks on one request is doubled, relative to before;
`experiments.benchmarks.layouts` gave 0.92 for the sequence and 0.97 for guidance."""

# torch starts new process groups whenever a mesh is divided, so what a group was divided into is kept
# for as long as that group lives. Equal meshes of a later world are other groups.
_DIVIDED: WeakKeyDictionary[dist.ProcessGroup, dict[int, DeviceMesh]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Layout:
    """Number of ranks of each mesh dim; the world size is their product.

    Attributes:
        cfg: ranks that the guidance branches are divided between.
        cp: ranks that the sequence is divided between.
        dp: replicas, of `cfg * cp` ranks each, that the requests are divided between.
    """

    cfg: int = 1
    cp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name in (CFG, CP, DP):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}", f"{getattr(self, name)} given, needs at least 1")

    @property
    def world_size(self) -> int:
        return self.dp * self.cfg * self.cp

    def __str__(self) -> str:
        return f"dp{self.dp}-cfg{self.cfg}-cp{self.cp}" if self.dp > 1 else f"cfg{self.cfg}-cp{self.cp}"

    @classmethod
    def auto(cls, world_size: int, guided: bool = True, requests: int = 1) -> Layout:
        """The layout to start with on `world_size` ranks; `reason` explains it.

        Replicas communicate nothing, so with many requests there are as many
        replicas as the requests keep busy. Inside one, guidance parallelism
        communicates least, so a guided run takes `cfg=2` if the number of ranks
        is even; the remaining factor goes to the sequence.
        """
        return cls._of_replica(world_size, guided, _replicas(world_size, requests))

    @classmethod
    def _of_replica(cls, world_size: int, guided: bool, dp: int) -> Layout:
        ranks = world_size // dp
        cfg = 2 if guided and ranks % 2 == 0 else 1
        return cls(cfg=cfg, cp=ranks // cfg, dp=dp)

    def reason(self, requests: int) -> str:
        """The reason why this layout suits that many requests, in a line."""
        ranks, turns = self.cfg * self.cp, -(-requests // self.dp)
        if self.dp == 1:
            who = "one rank does" if ranks == 1 else f"all {ranks} ranks do"
            return f"{who} one request after the other, which ends {'it' if requests == 1 else 'them'} soonest"
        each = f"{ranks} rank{'s' * (ranks > 1)}"
        return (
            f"{requests} requests are {turns} turn{'s' * (turns > 1)} of {self.dp} replicas of {each}, which send each "
            "other nothing"
        )

    @classmethod
    def resolve(
        cls,
        world_size: int,
        branches: int,
        cfg: int | None = None,
        cp: int | None = None,
        dp: int | None = None,
        requests: int = 1,
        unguided: str = "guidance scale 1",
    ) -> Layout:
        """The layout for the sizes that the user gave: sizes left out follow from the world size.

        In a world of one process the layout may need more ranks: the caller
        then has to start or to simulate them.

        Args:
            world_size: number of processes.
            branches: guidance branches of a step; 1 without guidance.
            cfg, cp, dp: the sizes asked for; None to choose.
            requests: number of requests to do.
            unguided: the reason why there is only one branch, or the condition for two.

        Raises:
            InputError: if no layout of that world fits, with a command that does.
        """
        cls(cfg=1 if cfg is None else cfg, cp=1 if cp is None else cp, dp=1 if dp is None else dp)
        if dp is None:
            dp = _replicas(world_size, requests, cfg, cp)
        ranks = max(1, world_size // dp)  # of a replica
        if cfg is None and cp is None:
            layout = cls._of_replica(ranks * dp, branches > 1, dp)
        elif world_size == 1:
            layout = cls(cfg=cfg or 1, cp=cp or 1, dp=dp)
        else:
            layout = cls(cfg=cfg or max(1, ranks // (cp or 1)), cp=cp or max(1, ranks // (cfg or 1)), dp=dp)
        if layout.cfg > branches:
            follows = "" if cfg else f" (what --cp {cp} leaves of {ranks} processes)"
            raise InputError(
                f"--cfg {layout.cfg}{follows}",
                f"this run has {branches} guidance branch{'es' if branches > 1 else ''}"
                f"{'' if branches > 1 else f' ({unguided})'}; use --cfg {branches}",
            )
        if world_size not in (1, layout.world_size):
            asked = ((CP, cp), (CFG, cfg), (DP, dp if dp > 1 else None))
            given = " ".join(f"--{name} {size}" for name, size in asked if size)
            raise InputError(
                given,
                f"does not fit {world_size} processes; start it with: {torchrun_command(layout)}",
            )
        return layout


def _replicas(world_size: int, requests: int, cfg: int | None = None, cp: int | None = None) -> int:
    """The number of replicas with which that many equal requests end soonest."""

    def fits(dp: int) -> bool:
        ranks = world_size // dp
        whole = cfg * cp == ranks if cfg and cp else ranks % (cfg or cp or 1) == 0
        return world_size % dp == 0 and whole

    def turns_of(dp: int) -> float:
        ranks = world_size // dp
        return -(-requests // dp) / (ranks * DOUBLING ** math.log2(ranks))

    return min((dp for dp in range(1, world_size + 1) if fits(dp) and dp <= requests), key=turns_of, default=1)


def init_mesh(layout: Layout, device_type: str | None = None, timeout: timedelta | None = None) -> DeviceMesh:
    """Start `torch.distributed`, if it is not started yet, and make a mesh of its ranks.

    Works under torchrun on one or several nodes, in a plain Python process
    (a world of one), and inside `meshdiff.simulate`.

    Args:
        layout: the size of each mesh dim; their product must be the world size.
        device_type: "cuda" (nccl) or "cpu" (gloo); by default "cuda" if the machine has GPUs.
        timeout: see `init_distributed`.

    Returns:
        A 2-D mesh with dims ("cfg", "cp"); with several replicas a 3-D one with
        "dp" before them, of which `replica` is this rank's 2-D part.

    Raises:
        InputError: if the layout does not fit the world, or the machine has
            fewer GPUs than ranks.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    keep_order_of_sums()
    init_distributed(timeout)
    if dist.get_world_size() != layout.world_size:
        raise InputError(
            f"--cp {layout.cp} --cfg {layout.cfg}" + f" --dp {layout.dp}" * (layout.dp > 1),
            f"needs {layout.world_size} processes and there are {dist.get_world_size()}; start it with: "
            f"{torchrun_command(layout)}",
        )
    if device_type == "cuda" and dist.get_backend() != "fake":
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    sizes = {DP: layout.dp, CFG: layout.cfg, CP: layout.cp}
    if layout.dp == 1:
        del sizes[DP]
    return with_timeout_of_world(init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)))


def replica(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that work on a request together with this one: a 2-D mesh with dims ("cfg", "cp")."""
    return mesh if mesh.mesh_dim_names == (CFG, CP) else mesh[CFG, CP]


def torchrun_command(layout: Layout) -> str:
    """The command that starts this program, with these flags, as a layout's ranks on one machine."""
    if sys.argv[0].endswith("__main__.py"):  # a package, started with -m
        program = ["-m", Path(sys.argv[0]).parent.name]
    elif sys.argv[0].endswith(".py"):
        program = [os.path.relpath(sys.argv[0])]
    else:  # a console script
        program = ["--no-python", Path(sys.argv[0]).name]
    return shlex.join(["torchrun", "--nproc-per-node", str(layout.world_size), *program, *sys.argv[1:]])


def check_gpus(ranks: int) -> None:
    """Raise `InputError` if this machine has fewer GPUs than `ranks`."""
    gpus = torch.cuda.device_count()
    if gpus < ranks:
        raise InputError(
            "--device",
            f"{ranks} ranks on a machine with {gpus} GPU{'' if gpus == 1 else 's'}; use fewer ranks, --device cpu, "
            "or --simulate to play them all in one process",
        )


def place(tensor: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """A DTensor of a plain tensor that is the same on every rank; each keeps its part, nothing is sent."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def on_mesh(tensor: Tensor, mesh: DeviceMesh, placements: list[Placement], shape: Sequence[int]) -> DTensor:
    """Use this rank's part of `tensor` as its part of a tensor on another mesh of the same ranks; nothing is sent.

    `shape` is the global shape of the tensor on that mesh.
    """
    assert isinstance(tensor, DTensor)
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        tensor.to_local(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def from_first_rank(tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype, mesh: DeviceMesh) -> DTensor:
    """Copy the tensor of the mesh's first rank to every rank, by a broadcast along each mesh dim with several ranks.

    Args:
        tensor: on the first rank; the argument of other ranks is not read.
        shape, dtype: of that tensor, which every rank has to know.
        mesh: with named dims.
    """
    if tensor is None:
        tensor = torch.empty(tuple(shape), dtype=dtype)
    tensor = tensor.to(device=mesh.device_type, dtype=dtype).contiguous()
    for dim in mesh.mesh_dim_names or ():
        if mesh[dim].size() > 1:
            # The ranks that are first along a dim have it from the dims before.
            tensor = distribute_tensor(tensor, mesh[dim], [Replicate()], src_data_rank=0).to_local()
    return place(tensor, mesh, [Replicate()] * mesh.ndim)


def ranks_of_replica(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of this rank's replica in a row; every rank must call it: it may start process groups.

    It does not use `mesh._flatten()`, after which uneven shards of that mesh are gathered wrongly (torch 2.13).
    """
    of_one = replica(mesh).size()
    if mesh.size() == of_one:
        return init_device_mesh(mesh.device_type, (of_one,), mesh_dim_names=("replica",))
    sizes = mesh.size() // of_one, of_one
    return with_timeout_of_world(init_device_mesh(mesh.device_type, sizes, mesh_dim_names=(DP, "replica")))["replica"]


def replicate_module(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Make every parameter and buffer of `module` a DTensor that is replicated on `mesh`.

    In place. Ranks must hold equal values already (they read the same file):
    nothing is sent.

    Raises:
        ValueError: if that has been done before.
    """
    if any(isinstance(tensor, DTensor) for tensor in [*module.parameters(), *module.buffers()]):
        raise ValueError("the module's weights are on a mesh already; load it again for another one")
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            value = DTensor.from_local(parameter.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
            child.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    return replicate_buffers(module, mesh)


def replicate_buffers(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Do the same as `replicate_module` for the buffers only, for modules whose parameters are streamed."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            buffer = buffer.to(mesh.device_type)
            child._buffers[name] = DTensor.from_local(buffer, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return on_shards(module)  # here, because weights that come and go are not put on the mesh by `replicate_module`


def ring_of_groups(mesh: DeviceMesh, size: int) -> DeviceMesh:
    """A 1-D mesh seen as groups of `size` neighbours: a 2-D mesh with dims ("ring", "ulysses").

    Every rank must call it, the first time: process groups are started.
    """
    groups = _DIVIDED.setdefault(mesh.get_group(), {})
    if size not in groups:
        groups[size] = with_timeout_of_world(mesh._unflatten(0, (mesh.size() // size, size), ("ring", "ulysses")))
    return groups[size]


def groups_within(group: dist.ProcessGroup) -> list[tuple[str, int | torch.SymInt]]:
    """The groups that `ring_of_groups` made of the group of a mesh dim: their names, and this rank's place in each."""
    return [
        (divided.get_group(name).group_name, divided.get_local_rank(name))
        for divided in _DIVIDED.get(group, {}).values()
        for name in ("ring", "ulysses")
    ]
