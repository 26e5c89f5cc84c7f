"""The entry to shards: the blocks of a transformer, and the tokens among their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from meshdiff.attention.problem import chunk_sizes
from meshdiff.autoshard.dtensor_utils import dtensors, to_shards

__all__ = ["become_shards", "find_blocks", "find_convolutions", "shard_tokens"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost module lists that look like transformer blocks, by name.

    Which modules these are decides how much runs on shards, never what comes
    out. A module without any such list is a block itself.
    """
    return dict(_blocks(module, "", _attends)) or dict(_blocks(module, "", _is_block)) or {"": module}


def _blocks(module: nn.Module, prefix: str, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and any(map(wanted, child.children())):
            yield from ((f"{path}.{i}", block) for i, block in child.named_children() if wanted(block))
        else:
            yield from _blocks(child, f"{path}.", wanted)


def _is_block(module: nn.Module) -> bool:
    own = not type(module).__module__.startswith("torch.nn")
    return own and sum(isinstance(part, nn.Linear) for part in module.modules()) >= 2


def _attends(module: nn.Module) -> bool:
    """True if it is a block with an attention in it, by name: modulation networks come as lists of blocks, too."""
    parts = [word for name, part in module.named_modules() for word in (name.lower(), type(part).__name__.lower())]
    return _is_block(module) and any("attn" in part or "attention" in part for part in parts)


def find_convolutions(module: nn.Module) -> dict[str, nn.Module]:
    """The modules with convolutions in them that are of no class of torch, by name, the outer ones too.

    Where one of them runs on replicated tensors, the next one goes on with shards.
    """
    found = {
        name: part
        for name, part in module.named_modules()
        if not type(part).__module__.startswith("torch.nn")
        and any(isinstance(one, CONVOLUTIONS) for one in part.modules())
    }
    return {"": module} | found


def shard_tokens(
    mesh: DeviceMesh, block: nn.Module, args: Any, kwargs: Any, others: Collection[str] = (), dim: int | None = None
) -> tuple[Any, Any, list[Any]]:
    """The arguments of a call of a block, the tokens among them sharded.

    The tokens are the first floating point tensor with at least two dims, and
    their sequence is the longest of the dims between the first and the last, or
    the first, where these are too short for all ranks. `others` are the names of
    further arguments to treat in the same way, see `become_shards`. A `dim` is the
    one to shard instead, of a tensor in which it comes after batch and channels.

    Returns:
        args and kwargs, and the pairs of plain tensors and what they became.
    """
    arguments = _bound(block, args, kwargs)
    tokens = next((value for value in arguments.values() if _may_be_tokens(value)), None)
    wanted = [] if isinstance(tokens, DTensor) and tokens.placements[0].is_shard() else [tokens]
    wanted += [arguments.get(name) for name in others]
    became = []
    for value in wanted:
        along = None if isinstance(value, DTensor) and value is not tokens else _sequence(value, mesh.size(), dim)
        if isinstance(value, Tensor) and along is not None:
            shards = to_shards(value, mesh, along)
            args, kwargs = _replaced(args, kwargs, value, shards)
            became.append((value, shards))
    return args, kwargs, became


def become_shards(mesh: DeviceMesh, block: nn.Module, args: Any, kwargs: Any, output: Any) -> set[str]:
    """Names of arguments, plain so far, that a block returns as shards: text that joint attention shards.

    Such arguments can be sharded at the entry of the block as well.
    """
    returned = {(leaf.shape, leaf.placements[0]) for leaf in dtensors(output)}
    found = set()
    for name, value in _bound(block, args, kwargs).items():
        dim = None if isinstance(value, DTensor) else _sequence(value, mesh.size())
        if dim is not None and (value.shape, Shard(dim)) in returned:
            found.add(name)
    return found


def _may_be_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def _sequence(value: Any, ranks: int, wanted: int | None = None) -> int | None:
    """The dim to shard, that one if it is given; None if no dim is long enough for every rank to get a part."""
    if not _may_be_tokens(value):
        return None
    if wanted is not None:
        fits = -value.ndim <= wanted < value.ndim and wanted % value.ndim > 1
        return wanted % value.ndim if fits and chunk_sizes(value.shape[wanted], ranks)[-1] else None
    longest = sorted(range(1, value.ndim - 1), key=lambda i: -value.shape[i])[:1]
    return next((dim for dim in (*longest, 0) if chunk_sizes(value.shape[dim], ranks)[-1]), None)


def _bound(block: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name; empty if they do not fit the signature, for which the call itself raises."""
    try:
        return _signature(type(block).forward).bind(block, *args, **kwargs).arguments
    except (TypeError, ValueError):
        return {}


@lru_cache(maxsize=1024)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _replaced(args: Any, kwargs: Any, value: Tensor, by: Tensor) -> tuple[Any, Any]:
    return (
        tuple(by if arg is value else arg for arg in args),
        {name: by if arg is value else arg for name, arg in kwargs.items()},
    )
