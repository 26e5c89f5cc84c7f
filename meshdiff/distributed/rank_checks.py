"""Checks that all ranks are given the same inputs and hold the same weights, before they meet in a collective."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.distributed.consensus import all_gather_object, store
from meshdiff.distributed.fingerprint import Reduce, fingerprint, sha256, sum_of_bits
from meshdiff.distributed.simulation import is_simulated
from meshdiff.distributed.torch_compat import tree_leaves

__all__ = ["check_alike", "check_inputs", "is_due"]

Facts = dict[tuple[Any, ...], Any]


def check_alike(mesh: DeviceMesh, module: nn.Module, arguments: Any, weights: bool = True) -> None:
    """Raise on every rank if they were given different tensors, or hold different weights; a collective.

    All values of the arguments are compared, and the sum of the bits of each weight and buffer; for tensors that are
    not plain, the facts that `fingerprint` lists. Weights that FSDP2 shards are compared between ranks
    that hold the same shard: no other rank has anything to compare them with.

    Args:
        mesh: of the ranks to compare.
        module: the model.
        arguments: what it is called with.
        weights: compare these as well, which takes a pass over all of them.

    Raises:
        ValueError: that names the rank, and what to do.
    """
    held = [*module.named_parameters(), *module.named_buffers()] if weights else []

    def facts(rank: int | None = None) -> list[Facts]:
        return [_facts(_given(arguments), sha256, rank), _facts(held, sum_of_bits, rank)]

    if is_simulated():
        ranks = [facts(rank) for rank in mesh.mesh.flatten().tolist()]
    else:
        ranks = all_gather_object(facts(), mesh, "the comparison of inputs and weights")
    _compare(module, ranks)


def is_due(calls: int) -> bool:
    """True if ranks compare the inputs of the call of that number, from 1.

    These are the first four calls, and then fewer and fewer. The second or third
    call is already on the result of a sampler's step from the initial noise.
    """
    return calls <= 4 or calls & (calls - 1) == 0


def check_inputs(mesh: DeviceMesh, module: nn.Module, arguments: Any, name: str) -> None:
    """Do the same as `check_alike` for the inputs alone, through the store and not by a collective, which costs more.

    Args:
        mesh: of the ranks to compare.
        module: the model.
        arguments: what it is called with.
        name: of this call, the same on every rank, and no other's.

    Raises:
        ValueError: as `check_alike`.
        RuntimeError: if other ranks do not come to this call.
    """
    if is_simulated():
        check_alike(mesh, module, arguments, weights=False)
        return
    keys = {rank: f"meshdiff/inputs/{name}/{rank}" for rank in mesh.mesh.flatten().tolist()}
    store().set(keys[dist.get_rank()], pickle.dumps([_facts(_given(arguments), sha256, None)]).hex())
    try:
        store().wait(list(keys.values()))
    except dist.DistStoreError as error:
        raise RuntimeError(
            f"other ranks did not come to this call of {type(module).__name__} in time; every rank is to call it alike"
        ) from error
    _compare(module, [pickle.loads(bytes.fromhex(store().get(key).decode())) for key in keys.values()])


def _given(arguments: Any) -> list[tuple[str, Tensor]]:
    return [(str(i), leaf) for i, leaf in enumerate(tree_leaves(arguments)) if isinstance(leaf, Tensor)]


def _compare(module: nn.Module, ranks: list[list[Facts]]) -> None:
    for i, what in enumerate(("inputs", "weights")[: len(ranks[0])]):
        first: Facts = {}
        for rank, found in enumerate(ranks):
            where = _differing(found[i], first)
            if where is not None:
                name = f" ({where})" if where and what == "weights" else ""
                raise ValueError(
                    f"{type(module).__name__} has other {what} on rank {rank} of this mesh than on rank 0{name}; give "
                    "every rank the same, random numbers from the same seed: torch.manual_seed(0), or a generator of "
                    "its own"
                )
            first = {**found[i], **first}


def _facts(tensors: Iterable[tuple[str, Tensor]], reduce: Reduce, rank: int | None) -> Facts:
    facts: Facts = {}
    for name, tensor in tensors:
        facts.update({(name, path, part): value for path, part, value in fingerprint(tensor, reduce, rank)})
    return facts | {(): tuple(dict.fromkeys(key[:2] for key in facts))}


def _differing(facts: Facts, first: Facts) -> str | None:
    """The name of a tensor that differs from that of earlier ranks; None if there is none.

    A shard is compared only if an earlier rank holds the same shard.
    """
    for key, value in facts.items():
        if first.get(key, value) != value:
            return key[0] if key else ""
    return None
