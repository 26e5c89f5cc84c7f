"""Weights that are stored elsewhere until a module needs them: in host memory, or sharded between all ranks.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", arXiv:1910.02054 (stage 3), for inference: a module's
weights are fetched just before it runs and released right after, and those of
the next module are fetched while it runs. The result has the same bits
wherever the weights are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.distributed.placements import PARTS, REPLICATED
from meshdiff.distributed.released_weight import ELSEWHERE, ReleasedWeight, in_memory_order
from meshdiff.distributed.simulation import on_each_rank, rank_values
from meshdiff.distributed.torch_compat import AsyncCollectiveTensor, autograd_task, saving_hooks

__all__ = ["Place", "Recent", "Storage", "Streamed", "StreamedWeights", "stream"]

ALIGNMENT = 64  # bytes; torch's own on CPUs, so kernels that look at it add up in the same order

Place = tuple[nn.Module, str]
"""A module and the name of one of its parameters."""


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
        weights = StreamedWeights([[_place_of(root, parameter)] for parameter in parameters], storage)
        streamed[name] = Streamed(root.get_submodule(name), weights)
    for name, module in streamed.items():
        owner, _, attribute = name.rpartition(".")
        # Names of nested ones stay what they are: a streamed module looks like what it holds.
        setattr(root.get_submodule(owner), attribute, module)
    for chain in chains:
        for name, following in zip(chain, [*chain[1:], None], strict=True):
            streamed[name].weights.following = streamed[following].weights if following else None


def _place_of(root: nn.Module, parameter: str) -> Place:
    owner, _, attribute = parameter.rpartition(".")
    return root.get_submodule(owner), attribute


class Streamed(nn.Module):
    """A module whose weights are fetched when it runs and released after it.

    It has every attribute of the module that it wraps.

    Args:
        module: the module to run.
        weights: its weights.
    """

    def __init__(self, module: nn.Module, weights: StreamedWeights) -> None:
        super().__init__()
        self.module = module
        self.weights = weights

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.weights.present():
            return self.module(*args, **kwargs)


class StreamedWeights:
    """Weights that are stored together, fetched when a module that they are of runs, and released after it.

    Elsewhere each of them is a `ReleasedWeight`.

    Args:
        places: of each parameter, where it is: more than one place if modules share it. Plain tensors.
        storage: the place of their values.
        recent: shared by all weights of a model, so that a backward pass holds those of one module at a time.

    Attributes:
        following: weights to fetch while the modules of these run.
        preceding: weights to fetch in the backward pass while these are in use.
        nbytes: size of all of them.
        reads: number of times that one was read outside of its modules.
    """

    def __init__(self, places: Sequence[Sequence[Place]], storage: Storage, recent: Recent | None = None) -> None:
        self.recent = recent or Recent()
        self.following: StreamedWeights | None = None
        self.preceding: StreamedWeights | None = None
        self.on_present: Callable[[StreamedWeights], None] = lambda weights: None
        self._storage = storage
        self._places = [list(of_parameter) for of_parameter in places]
        self._layout: list[tuple[int, torch.Size, tuple[int, ...], torch.dtype]] = []
        self._users = 0
        self.reads = 0
        total = 0
        parameters = [getattr(*of_parameter[0]) for of_parameter in self._places]
        for parameter in parameters:
            self._layout.append((total, parameter.shape, in_memory_order(parameter)[1], parameter.dtype))
            total += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = sum(parameter.nbytes for parameter in parameters)
        stored = _stored_part(parameters, [start for start, *_ in self._layout], total, storage)
        self._released: list[Any] = [
            ReleasedWeight(parameter, storage.device, partial(self._read, number))
            for number, parameter in enumerate(parameters)
        ]
        del parameters
        self._leave()
        self._stored = stored
        self._coming: Tensor | None = None
        self._side_stream = torch.cuda.Stream(storage.device) if storage.device.type == "cuda" else None

    @property
    def stored_bytes(self) -> int:
        """Size of the part that this rank stores, in bytes; the largest part of simulated ranks."""
        return max(part.nbytes for part in rank_values(self._stored))

    def fetch(self) -> None:
        """Start to fetch the weights, if that has not been started yet."""
        if self._coming is None:
            with _counting_writes(), torch.cuda.stream(self._side_stream):  # None is no stream, which does nothing
                self._coming = _bring(self._stored, self._storage)

    def drop(self) -> None:
        """Give up what was fetched and is not in use."""
        if isinstance(self._coming, AsyncCollectiveTensor):
            self._coming.wait()
        self._coming = None

    @contextmanager
    def present(self) -> Iterator[None]:
        """Have the values in the body, in which a module runs; in the backward pass they are fetched again."""
        if self._users:  # by a module that shares some of them, or runs inside of another one
            self._users += 1
            try:
                yield
            finally:
                self._users -= 1
            return
        self._check_released()
        if autograd_task() == -1:
            self.recent.clear()
        buffer = self._fetched()
        try:
            self._users = 1
            with _counting_writes():
                self._arrive(buffer)
            self.on_present(self)
            if self.following is not None:
                self.following.fetch()
            before = _versions(buffer)
            with _NotSaved(self, buffer) if torch.is_grad_enabled() else nullcontext():
                yield
            if _versions(buffer) != before:
                raise RuntimeError(f"a module wrote to one of its own weights while it ran, which {ELSEWHERE}")
        finally:
            self._users = 0
            self._leave()

    def put_back(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let parameters be in the places of the released weights; what others have put there since then stays."""
        for released, places, parameter in zip(self._released, self._places, parameters, strict=True):
            for owner, name in places:
                if owner._parameters.get(name) is released:
                    owner._parameters[name] = parameter

    def values(self) -> list[Tensor]:
        """The value of each weight; a collective if ranks store a part each."""
        with torch.no_grad():
            buffer = rank_values(self._fetched())[0]
            return [self._view(buffer, number) for number in range(len(self._layout))]

    def _read(self, number: int) -> Tensor:
        """One weight, for code that reads it outside of its modules."""
        self.reads += 1
        return self.values()[number]

    def _fetched(self) -> Tensor:
        """The full buffer, on the device."""
        self.fetch()
        buffer, self._coming = self._coming, None
        assert buffer is not None
        if isinstance(buffer, AsyncCollectiveTensor):
            with _counting_writes():
                buffer = buffer.wait()
        if self._side_stream is not None:
            torch.cuda.current_stream().wait_stream(self._side_stream)
            buffer.record_stream(torch.cuda.current_stream())
        return buffer

    def _view(self, buffer: Tensor, number: int) -> Tensor:
        start, shape, stride, dtype = self._layout[number]
        return buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).as_strided(shape, stride)

    def _check_released(self) -> None:
        for released, places in zip(self._released, self._places, strict=True):
            for owner, name in places:
                if owner._parameters.get(name) is not released:
                    raise RuntimeError(f"the {name} of a {type(owner).__name__} was replaced, which {ELSEWHERE}")

    def _arrive(self, buffer: Tensor) -> None:
        for number, places in enumerate(self._places):
            value = self._view(buffer, number)
            if self._storage.mesh is None:
                value = rank_values(value)[0]
            else:
                value = DTensor.from_local(value, self._storage.mesh, [REPLICATED], run_check=False)
            parameter = nn.Parameter(value, requires_grad=False)
            for owner, name in places:
                owner._parameters[name] = parameter

    def _leave(self) -> None:
        for released, places in zip(self._released, self._places, strict=True):
            for owner, name in places:
                owner._parameters[name] = released


class Recent:
    """The weights that a backward pass has fetched last, of all that are streamed for one model."""

    def __init__(self) -> None:
        self._weights: StreamedWeights | None = None
        self._buffer: Tensor | None = None

    def buffer_of(self, weights: StreamedWeights) -> Tensor:
        if self._weights is not weights or self._buffer is None:
            self.clear()
            self._weights, self._buffer = weights, rank_values(weights._fetched())[0]
            if weights.preceding is not None:
                weights.preceding.fetch()
        return self._buffer

    def clear(self) -> None:
        self._weights = self._buffer = None


@contextmanager
def _counting_writes() -> Iterator[None]:
    """Make tensors in the body without gradients, writes to which are counted, in inference mode as well."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _versions(buffer: Tensor) -> list[int]:
    """Number of writes to a buffer and to its views, of each simulated rank."""
    return [values._version for values in rank_values(buffer)]


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps instead of a tensor, and the function that makes the tensor of it."""

    packed: Any
    unpack: Callable[[Any], Tensor]


class _NotSaved(saved_tensors_hooks):
    """Let autograd keep the place of a fetched weight, and fetch it again when the backward pass needs it.

    Other tensors are for the hooks that were on before: those of `torch.utils.checkpoint`, say.
    """

    def __init__(self, weights: StreamedWeights, buffer: Tensor) -> None:
        others = saving_hooks()
        address = rank_values(buffer)[0].untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Any:
            if type(tensor) in (Tensor, nn.Parameter) and tensor.untyped_storage().data_ptr() == address:
                return _Saved((tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()), fetch)
            return tensor if others is None else _Saved(others[0](tensor), others[1])

        def fetch(packed: Any) -> Tensor:
            dtype, *place = packed
            with torch.no_grad():
                return weights.recent.buffer_of(weights).view(dtype).as_strided(*place)

        def unpack(saved: Any) -> Tensor:
            return saved.unpack(saved.packed) if isinstance(saved, _Saved) else saved

        super().__init__(pack, unpack)


def _stored_part(parameters: Sequence[Tensor], starts: Sequence[int], total: int, storage: Storage) -> Tensor:
    """The bytes that this rank stores of all parameters in a row, which begin at `starts`.

    All ranks' parts are equally long, and aligned for any dtype. Nothing but the part is allocated, whose memory is
    never taken for anything else: freed buffers of about its size would be left as holes between parts.
    """
    ranks = 1 if storage.divided is None else storage.divided.size()
    size = -(-total // (ALIGNMENT * ranks)) * ALIGNMENT
    rank = 0 if storage.divided is None else storage.divided.get_local_rank()
    on_host = storage.on_host and storage.device.type == "cuda"
    device = torch.device("cpu") if storage.on_host else storage.device

    @on_each_rank
    def part(rank: int, *flat: Tensor) -> Tensor:
        stored = torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=on_host)
        for start, values in zip(starts, flat, strict=True):
            first, last = max(start, rank * size), min(start + values.numel(), (rank + 1) * size)
            if first < last:
                stored[first - rank * size : last - rank * size] = values[first - start : last - start]
        return stored

    flat = (in_memory_order(parameter.detach())[0].view(torch.uint8) for parameter in parameters)
    return part(rank, *flat)


def _bring(stored: Tensor, storage: Storage) -> Tensor:
    """The full buffer on the device, or the pending result of the all-gather that makes it."""
    stored = stored.to(storage.device, non_blocking=True)
    if storage.divided is None:
        return stored
    parts = DTensor.from_local(stored, storage.divided, [PARTS], run_check=False)
    return parts.redistribute(placements=[REPLICATED], async_op=True).to_local()
