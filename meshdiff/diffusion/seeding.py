"""Random numbers for code without a generator of its own: the same on every rank; global generators are restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global generator for the body, then give each back the state that it had, also if the body raises.

    They are those of torch (of the CPU, and of every device of the accelerator that this process uses), of `random`,
    and of NumPy where it is installed. Two bodies of one seed draw the same numbers, in whatever process.

    They do not draw the numbers of `torch.Generator().manual_seed(seed)`: noise of a sampling step that comes from a
    global generator must not be the initial noise again.

    Args:
        seed: any integer.

    Example:
        >>> with seeded(0):
        ...     first = torch.randn(3)
        >>> with seeded(0):
        ...     assert torch.equal(torch.randn(3), first)
    """
    number = random.Random(f"global generators of seed {seed}").getrandbits(32)  # 32: the most that NumPy takes
    with ExitStack() as states:
        states.callback(torch.set_rng_state, torch.get_rng_state())
        torch.default_generator.manual_seed(number)
        accelerator = _accelerator()
        if accelerator is not None:
            every = "_all" if hasattr(accelerator, "get_rng_state_all") else ""  # MPS has one device and no such names
            state = getattr(accelerator, f"get_rng_state{every}")()
            states.callback(getattr(accelerator, f"set_rng_state{every}"), state)
            getattr(accelerator, f"manual_seed{every}")(number)
        states.callback(random.setstate, random.getstate())
        random.seed(number)
        numpy = _numpy()
        if numpy is not None:
            states.callback(numpy.random.set_state, numpy.random.get_state())
            numpy.random.seed(number)
        yield


def _accelerator() -> ModuleType | None:
    """The module of this machine's accelerator, `torch.cuda` say, if this process uses one.

    Reading the state of an unused one would initialize it, which takes seconds and memory, and fails in a fork.
    """
    if not torch.accelerator.is_available():
        return None
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    in_use = getattr(module, "is_initialized", None)
    return module if in_use is None or in_use() else None


def _numpy() -> ModuleType | None:
    """NumPy, which the library does not need; None if it is not installed."""
    try:
        import numpy
    except ImportError:
        return None
    return numpy
