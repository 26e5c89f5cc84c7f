"""Calls of a module's forward that go by way of a function of ours, whatever others do to that forward.

Hooks of accelerate and diffusers, caches and monkey patches replace `forward`
on a module or on its class, before it is put on a mesh or later, and take it
back when they end. So the forward itself is not replaced. The module becomes an
instance of a subclass of its class, as `torch.distributed.fsdp.fully_shard`
does it, whose `forward` is a data descriptor: reading it gives an `Entry` to
what is the forward at that time, and what is assigned becomes the forward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from torch import nn

from meshdiff.distributed.torch_compat import UNCOMPILED, uncompiled

__all__ = ["KEY", "Entry", "Interception", "original_class", "owners", "set_class"]

KEY = "_meshdiff_interceptions"
"""The attribute of a module that holds its `_Chain`."""

Forward = Callable[..., Any]
Around = Callable[[Forward, Any, Any], Any]


class Interception:
    """Calls of `module.forward` become calls of `around`; the latest interception of a module is the outermost.

    Copies of the module (`copy.deepcopy`, pickle) are not intercepted: they are
    instances of the module's own class.

    Args:
        module: any module.
        around: given the forward that was called, and its args and kwargs, returns the output.
        owner: what the interception is part of, see `owners`.
        innermost: inside of those that are there already.
    """

    def __init__(self, module: nn.Module, around: Around, owner: object = None, innermost: bool = False) -> None:
        self.module, self.around, self.owner = module, around, owner
        if KEY not in vars(module):
            kind: Any = type(module)
            intercepted = _intercepted(kind)
            vars(module)[KEY] = _Chain()
            object.__setattr__(module, "__class__", intercepted)
        members = vars(module)[KEY].members
        members.insert(0 if innermost else len(members), self)

    def remove(self) -> None:
        """Calls no longer go by way of `around`; forwards that others have put there stay."""
        chain = vars(self.module).get(KEY)
        if chain is None or self not in chain.members:
            return
        chain.members.remove(self)
        if not chain.members:
            del vars(self.module)[KEY]
            _SLOT.__set__(self.module, original_class(self.module))


class _Chain:
    """The interceptions of one module.

    Attributes:
        members: the innermost first.
        depth: number of its forwards that run now; what is called inside of one is not intercepted again.
    """

    def __init__(self) -> None:
        self.members: list[Interception] = []
        self.depth = 0
        self._entry: tuple[Any, Entry] | None = None

    def __reduce__(self) -> Any:
        return _Chain, ()  # a copy is not intercepted, however it was made

    def entry(self, module: nn.Module, base: Any) -> Entry:
        """The `Entry` to what is the module's forward now, which is read at every call."""
        own = vars(module).get("forward")
        key = base.forward if own is None else own
        if self._entry is None or self._entry[0] is not key:
            inner = getattr(super(type(module), module), "forward") if own is None else own  # noqa: B009
            self._entry = key, Entry(module, inner)
        return self._entry[1]


class Entry:
    """A forward of a module, by way of its interceptions; name, documentation and signature are the forward's.

    Args:
        module: the module.
        inner: its forward.
    """

    def __init__(self, module: nn.Module, inner: Forward) -> None:
        functools.update_wrapper(self, inner)
        self.module, self.inner = module, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chain = vars(self.module).get(KEY)
        if chain is None or chain.depth or not chain.members:
            return self.inner(*args, **kwargs)
        call = partial(_inside, chain, self.inner)
        for member in chain.members[:-1]:
            call = partial(_around, member.around, call)
        return uncompiled(chain.members[-1].around, call, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # of one that is being made
            raise AttributeError(name)
        return getattr(self.inner, name)  # `__func__` of a method, say

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.inner, memo)

    def __reduce__(self) -> Any:
        return _same, (self.inner,)


def _same(value: Any) -> Any:
    return value


def _around(around: Around, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    return around(inner, args, kwargs)


def _inside(chain: _Chain, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    chain.depth += 1
    try:
        return inner(*args, **kwargs)
    finally:
        chain.depth -= 1


class _Forward:
    """The `forward` of an intercepted module."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self.base.forward
        if KEY not in vars(module):  # made of the subclass by somebody who asked for type(module)
            return vars(module).get("forward") or self.base.forward.__get__(module)
        return vars(module)[KEY].entry(module, self.base)

    def __set__(self, module: nn.Module, value: Any) -> None:
        while type(value) is Entry and value.module is module:
            value = value.inner
        vars(module)["forward"] = value

    def __delete__(self, module: nn.Module) -> None:
        if vars(module).pop("forward", None) is None:
            raise AttributeError("forward")


def owners(module: nn.Module) -> Iterator[object]:
    """The owner of each interception of a module and of its submodules."""
    for part in module.modules():
        for member in vars(part)[KEY].members if KEY in vars(part) else ():
            yield member.owner


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was intercepted."""
    return getattr(type(module), "_meshdiff_base", type(module))


def set_class(module: nn.Module, cls: type) -> None:
    """Make a module an instance of a class, which may be one that is intercepted."""
    _SLOT.__set__(module, cls)


_SLOT: Any = object.__dict__["__class__"]


def _get_class(module: nn.Module) -> type:
    return original_class(module)


def _set_class(module: nn.Module, value: type) -> None:
    _SLOT.__set__(module, value if "_meshdiff_base" in vars(value) else _intercepted(value))


def _reduce_ex(module: nn.Module, protocol: Any) -> Any:
    """The parts from which `copy` and `pickle` make a new module: the original class, and the state of this module."""
    base = original_class(module)
    parts: Any = super(type(module), module).__reduce_ex__(protocol)
    function, args, state, *rest = parts
    args = tuple(base if arg is type(module) else arg for arg in args)
    own = {key: value for key, value in vars(module).items() if key != KEY}
    if state is vars(module):
        state = own
    elif isinstance(state, dict):
        state = {key: value for key, value in state.items() if key != KEY}
    return function, args, state, *rest


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # torch.compile looks for the forward in the class, where there is none that is intercepted.
    of_base: Any = super(type(module), module)
    return uncompiled(of_base.__call__, *args, **kwargs)


def _compile(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(f"{type(module).__name__}.compile() cannot trace it, for {UNCOMPILED}")


def _set_on_base(cls: Any, name: str, value: Any) -> None:
    setattr(cls._meshdiff_base, name, value)


def _delete_on_base(cls: Any, name: str) -> None:
    delattr(cls._meshdiff_base, name)


def _make_base(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return cls._meshdiff_base(*args, **kwargs)


@lru_cache(maxsize=1024)
def _intercepted(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class whose instances are intercepted, by the same name; to patch it is to patch the class."""
    methods = {"__setattr__": _set_on_base, "__delattr__": _delete_on_base, "__call__": _make_base}
    meta: Any = type("meta", (type(base),), methods)
    members = {
        "forward": _Forward(base),
        "__call__": _call,
        "compile": _compile,
        "__class__": property(_get_class, _set_class),
        "__reduce_ex__": _reduce_ex,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_meshdiff_base": base,
    }
    try:
        return meta(base.__name__, (base,), members)
    except Exception as error:
        raise ValueError(f"{base.__name__} cannot be put on a mesh: it allows no subclass ({error})") from error
