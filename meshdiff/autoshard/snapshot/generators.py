"""Generators of random numbers and arrays, of torch, Python and NumPy, which the library does without."""

from __future__ import annotations

import pickle
import random
import sys
from typing import Any

import torch

from meshdiff.distributed.simulation import holds_all_ranks

__all__ = ["default_generators", "is_array", "is_generator", "set_state", "state_of"]


def default_generators() -> list[Any]:
    """Generators that are everybody's: of the CPU, of this rank's GPU, Python's own and NumPy's."""
    numpy = sys.modules.get("numpy.random")
    of_python = [random, *([numpy] if numpy else [])]
    if holds_all_ranks():  # a simulation has states of torch's for each rank
        return of_python
    on_gpu = [torch.cuda.default_generators[torch.cuda.current_device()]] if torch.cuda.is_initialized() else []
    return [*of_python, torch.default_generator, *on_gpu]


def is_generator(value: Any) -> bool:
    """True if random numbers are drawn from it."""
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)  # which has no state
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState))


def is_array(value: Any) -> bool:
    """True for an array of NumPy, of numbers."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject


def state_of(generator: Any) -> Any:
    """The state of a generator, or of the module that has one by default, to be compared."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if hasattr(generator, "getstate"):
        return generator.getstate()
    if hasattr(generator, "get_state"):
        name, keys, *rest = generator.get_state()
        return name, keys.tobytes(), *rest
    return pickle.dumps(generator.bit_generator.state)


def set_state(generator: Any, state: Any) -> None:
    """Give a generator a state back."""
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif hasattr(generator, "setstate"):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        name, keys, *rest = state
        generator.set_state((name, sys.modules["numpy"].frombuffer(keys, dtype="uint32"), *rest))
    else:
        generator.bit_generator.state = pickle.loads(state)
