"""A guard for operations on shards: every operation of torch passes through it while a model runs.

DTensor has rules for most operations, and a few of its rules are wrong on
uneven shards, in place, or for random numbers. So an operation runs on shards
only if it is known to be right there; nothing here knows any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from meshdiff.autoshard.aliasing import AliasTracker, memory
from meshdiff.autoshard.lazy import LazyReshards
from meshdiff.autoshard.op_traits import Dim, traits_of
from meshdiff.autoshard.recorder import calling_line
from meshdiff.distributed.torch_compat import HigherOrderOperator, TorchDispatchMode, current_dispatch_mode

__all__ = ["SafetyMode", "UnsafeMutation", "UnsupportedOnShards"]


class UnsupportedOnShards(Exception):
    """This operation is not known to be right on shards; nothing has been done yet."""


class UnsafeMutation(RuntimeError):
    """This program, on shards, would do something else than on one device; run it on replicated tensors."""


@dataclass(frozen=True)
class OperationKind:
    """Properties of an ATen operation that decide if it may run on shards.

    Attributes:
        name: without `aten::` and without the overload.
        pointwise: torch tags it so: it goes element by element.
        random: it draws random numbers.
        view: its result may share memory with an operand to which it does not write.
        written: the operands to which it writes, by place, or by name if they are keyword-only.
    """

    name: str
    pointwise: bool
    random: bool
    view: bool
    written: tuple[int | str, ...]


@lru_cache(maxsize=4096)
def kind_of(func: Any) -> OperationKind:
    schema = func._schema
    written = [
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return OperationKind(
        schema.name.removeprefix("aten::"),
        torch.Tag.pointwise in func.tags,
        torch.Tag.nondeterministic_seeded in func.tags,
        view,
        tuple(written),
    )


class SafetyMode(TorchDispatchMode):
    """Stops operations that are not known to be right on shards, and writes that would miss a copy.

    Args:
        aliases: a record of tensors that would share memory on one device.
        lazy: what waits for rows, which a write to where they are now would change.
        on_operation: called for every operation with its function, arguments and result.
    """

    supports_higher_order_operators = True  # such as flex attention

    def __init__(
        self, aliases: AliasTracker, lazy: LazyReshards, on_operation: Callable[[Any, Any, Any], None] | None = None
    ) -> None:
        super().__init__()
        self.aliases, self.lazy = aliases, lazy
        self.on_operation = on_operation

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn it off for operations that are right by construction: to check a small one takes longer than it runs."""
        if current_dispatch_mode() is not self:  # another one, which has to see them, would go too
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let flex attention compile itself; modules that are compiled, which nothing here sees into, are refused."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sharded = any(issubclass(t, DTensor) for t in types)
        if isinstance(func, HigherOrderOperator):
            if sharded:
                raise UnsupportedOnShards(func.name())
            return func(*args, **kwargs)
        kind = kind_of(func)
        if not sharded and not kind.written and self.on_operation is None:
            return func(*args, **kwargs)
        if self.lazy and (kind.written or any(tensor in self.lazy for tensor in _tensors([*args, *kwargs.values()]))):
            self.lazy.materialize_all()
        if sharded and torch.Tag.inplace_view in func.tags:  # "new shape in place"
            raise UnsafeMutation(f"{kind.name} changes a tensor's shape in place, and shards keep theirs")
        if sharded and not _is_known(kind, args, kwargs):
            raise UnsupportedOnShards(kind.name)
        for place in kind.written:
            written = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
            for tensor in _tensors(written):
                if sharded and not isinstance(tensor, DTensor):
                    raise UnsupportedOnShards(kind.name)
                if self.aliases.has_live_aliases(tensor):
                    where = f"{kind.name} ({calling_line()})"
                    raise UnsafeMutation(f"{where} writes to memory that a view of it, or what it is a view of, shares")
                if not isinstance(written, Tensor):  # torch counts no write to a list of tensors beneath a mode
                    if torch.is_grad_enabled() and tensor.requires_grad:
                        raise UnsafeMutation(
                            f"{kind.name} ({calling_line()}) writes to tensors in a way that loses gradients"
                        )
                    torch.autograd.graph.increment_version(tensor)
        result = func(*args, **kwargs)
        if sharded and kind.written:
            self.aliases.writes += 1
        if sharded and kind.view:
            self._note_copies(args[0], result)
        if self.on_operation is not None:
            self.on_operation(func, (args, kwargs), result)
        return result

    def _note_copies(self, source: Tensor, result: Any) -> None:
        for tensor in _tensors(result):
            if memory(tensor)._cdata != memory(source)._cdata:
                self.aliases.link(source, tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _is_known(kind: OperationKind, args: Any, kwargs: Any) -> bool:
    tensors = [tensor for tensor in _tensors([*args, *kwargs.values()]) if isinstance(tensor, DTensor)]
    # Names in quotes are those of programs in tests/autoshard/test_dtensor_rules.py, see `op_traits`.
    partial = any(placement.is_partial() for tensor in tensors for placement in tensor.placements)
    if partial and not kind.view and kind.name not in ("_unsafe_view", "clone", "_to_copy"):
        return False  # "constant in a partial sum", "write to a partial sum", "number of a partial sum"
    if kind.random:  # "dropout"
        return False
    if any(tensor.numel() == 0 for tensor in tensors):  # "view of nothing"
        return False
    if kind.pointwise or traits_of(kind.name).shard_safe or (kind.name == "slice" and _takes_all(*args)):
        return True
    if kind.name == "repeat":  # as `sort` in `op_traits`
        return all(tensor.placements[0].is_replicate() or _times(tensor, args[1]) == 1 for tensor in tensors)
    along = traits_of(kind.name).safe_unless_dim
    if along is None or not isinstance(args[0], DTensor):
        return False
    dims = _dims(along, args, kwargs)
    return dims is not None and all(
        placement.is_replicate() or (isinstance(placement, Shard) and placement.dim not in dims)
        for placement in args[0].placements
    )


def _times(tensor: DTensor, repeats: Any) -> int:
    """Number of times the sharded dim is repeated; 0 if there is none."""
    placement = tensor.placements[0]
    return repeats[placement.dim + len(repeats) - tensor.ndim] if isinstance(placement, Shard) else 0


def _dims(along: Dim, args: Any, kwargs: Any) -> set[int] | None:
    """The dims that an operation goes along; None for all of them."""
    given = kwargs.get("dim", args[along.place] if len(args) > along.place else along.default)
    if given is None or given == [] or isinstance(given, (bool, Tensor)):
        return None
    return {dim % args[0].ndim for dim in (given if isinstance(given, (list, tuple)) else [given])}


def _takes_all(tensor: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    """True if a slice takes all of the dim."""
    length = tensor.shape[dim]
    return step == 1 and start in (None, 0, -length) and (end is None or end >= length)
