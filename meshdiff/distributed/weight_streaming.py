"""Weights that are stored elsewhere until a module needs them: in host memory, or sharded between all ranks.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", arXiv:1910.02054 (stage 3), for inference: a module's
weights are fetched just before it runs and released right after, and those of
the next module are fetched while it runs. The result has the same bits
wherever the weights are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.distributed.mesh import place
from meshdiff.distributed.placements import PARTS, REPLICATED
from meshdiff.distributed.torch_compat import AsyncCollectiveTensor

__all__ = ["Storage", "Streamed", "stream"]

ALIGNMENT = 64  # bytes; torch's own on CPUs, so kernels that look at it add up in the same order


@dataclass(frozen=True)
class Storage:
    """The place of weights while they are not needed, and their place while their module runs.

    Attributes:
        device: where modules run.
        mesh: the 1-D mesh on which a module's weights are DTensors while it runs; None for plain ones.
        divided: the 1-D mesh whose ranks store a part each; None where each rank stores everything.
        on_host: store in host memory, pinned where the device is a GPU.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    divided: DeviceMesh | None = None
    on_host: bool = False


def stream(
    root: nn.Module, chains: Sequence[Sequence[str]], load: Callable[[list[str]], None], storage: Storage
) -> None:
    """Replace modules inside `root` by `Streamed` ones, in place.

    Args:
        root: its parameters may be on the meta device.
        chains: for each chain, names of modules in the order in which they run.
            Together they hold all parameters; a parameter belongs to the
            innermost of them.
        load: makes the parameters of those names, in `root`, plain tensors with
            values, on `storage.device`. Called for one module at a time, so a
            process holds the full weights of only one module at a time.
        storage: the place of the weights, see `Storage`.
    """
    owned: dict[str, list[str]] = {name: [] for chain in chains for name in chain}
    for parameter, _ in root.named_parameters():
        owner = max((name for name in owned if parameter.startswith(f"{name}.")), key=len)
        owned[owner].append(parameter)
    streamed = {}
    for name, parameters in owned.items():
        load(parameters)
        streamed[name] = Streamed(root.get_submodule(name), [_place_of(root, p) for p in parameters], storage)
    for name, module in streamed.items():
        owner, _, attribute = name.rpartition(".")
        # Names of nested ones stay what they are: a streamed module looks like what it holds.
        setattr(root.get_submodule(owner), attribute, module)
    for chain in chains:
        for name, following in zip(chain, [*chain[1:], None], strict=True):
            streamed[name].following = (streamed[following],) if following else ()


def _place_of(root: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    owner, _, attribute = parameter.rpartition(".")
    return root.get_submodule(owner), attribute


class Streamed(nn.Module):
    """A module whose weights are fetched when it runs and released after it.

    It has every attribute of the module that it wraps.

    Args:
        module: the module to run.
        places: its parameters, each as a module and a name in it. Plain tensors.
        storage: the place of its weights.
    """

    def __init__(self, module: nn.Module, places: Sequence[tuple[nn.Module, str]], storage: Storage) -> None:
        super().__init__()
        self.module = module
        self.following: tuple[Streamed, ...] = ()  # in a tuple, which is no submodule
        self._storage = storage
        self._places = list(places)
        self._layout, total = [], 0
        for owner, name in self._places:
            parameter = getattr(owner, name)
            self._layout.append((total, parameter.nbytes, parameter.shape, parameter.dtype))
            total += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = self._packed(total)
        self._leave()  # before more memory is taken
        self._stored = _store(buffer, storage)
        self._coming: Tensor | None = None
        self._side_stream = torch.cuda.Stream(storage.device) if storage.device.type == "cuda" else None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._weights():
            return self.module(*args, **kwargs)

    def fetch(self) -> None:
        """Start to fetch the weights, if that has not been started yet."""
        if self._coming is None:
            with torch.no_grad(), torch.cuda.stream(self._side_stream):  # None is no stream, which does nothing
                self._coming = _bring(self._stored, self._storage)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        self.fetch()
        buffer, self._coming = self._coming, None
        assert buffer is not None
        if isinstance(buffer, AsyncCollectiveTensor):
            buffer = buffer.wait()
        if self._side_stream is not None:
            torch.cuda.current_stream().wait_stream(self._side_stream)
            buffer.record_stream(torch.cuda.current_stream())
        self._arrive(buffer)
        for module in self.following:
            module.fetch()
        try:
            yield
        finally:
            self._leave()

    def _packed(self, total: int) -> Tensor:
        """All parameters in one buffer of bytes, which divides into equal parts that are aligned for any dtype."""
        divided = self._storage.divided
        unit = ALIGNMENT * (1 if divided is None else divided.size())
        first = getattr(*self._places[0])
        buffer = torch.zeros(-(-total // unit) * unit, dtype=torch.uint8, device=first.device)
        for (owner, name), (start, nbytes, _, _) in zip(self._places, self._layout, strict=True):
            parameter = getattr(owner, name).detach().contiguous()
            buffer[start : start + nbytes] = parameter.view(-1).view(torch.uint8)
        return buffer

    def _arrive(self, buffer: Tensor) -> None:
        for (owner, name), (start, nbytes, shape, dtype) in zip(self._places, self._layout, strict=True):
            value = buffer[start : start + nbytes].view(dtype).view(shape)
            if self._storage.mesh is not None:
                value = DTensor.from_local(value, self._storage.mesh, [REPLICATED], run_check=False)
            owner._parameters[name] = nn.Parameter(value, requires_grad=False)

    def _leave(self) -> None:
        for (owner, name), (_, _, shape, dtype) in zip(self._places, self._layout, strict=True):
            nothing = torch.empty(shape, dtype=dtype, device="meta")
            owner._parameters[name] = nn.Parameter(nothing, requires_grad=False)


def _store(buffer: Tensor, storage: Storage) -> Tensor:
    """The part of a buffer that this rank stores."""
    shard = buffer
    if storage.divided is not None and storage.divided.size() > 1:
        shard = place(buffer, storage.divided, [PARTS]).to_local().clone()
    if storage.on_host:
        shard = shard.cpu()
        if storage.device.type == "cuda":
            shard = shard.pin_memory()
    return shard


def _bring(stored: Tensor, storage: Storage) -> Tensor:
    """The full buffer on the device, or the pending result of the all-gather that makes it."""
    stored = stored.to(storage.device, non_blocking=True)
    if storage.divided is None:
        return stored
    parts = DTensor.from_local(stored, storage.divided, [PARTS], run_check=False)
    return parts.redistribute(placements=[REPLICATED], async_op=True).to_local()
