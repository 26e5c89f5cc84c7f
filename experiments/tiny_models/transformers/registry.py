"""Tiny models by name: the sizes of each, and inputs that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

__all__ = ["TINY", "Draw", "Tiny", "tiny"]

Draw = Callable[..., Tensor]
"""Normal random numbers of a shape."""

SPREAD = 0.1
"""Standard deviation of random weights; a model's own initial weights are zero in places, which would hide errors."""


@dataclass(frozen=True)
class Tiny:
    """A model of random weights.

    Attributes:
        name: its class in diffusers.
        config: what its class takes.
        inputs: makes the arguments of a call from a source of random numbers.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[Draw], dict[str, Any]]

    def build(self, seed: int = 0) -> nn.Module:
        """The model in float32, ready for inference; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, self.name)(**self.config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    of_norm = parameter.ndim == 1 and bool((parameter == 1).all())
                    parameter.copy_(torch.randn(parameter.shape) * SPREAD + of_norm)
        return model

    def arguments(self, seed: int = 1) -> dict[str, Any]:
        """The arguments of a call of the model, by name."""
        generator = torch.Generator().manual_seed(seed)
        return self.inputs(lambda *shape: torch.randn(*shape, generator=generator))


TINY: dict[str, Tiny] = {}


def tiny(name: str, **config: Any) -> Callable[[Callable[[Draw], dict[str, Any]]], Callable[[Draw], dict[str, Any]]]:
    """Register the function below, which makes the inputs of a model of that class and those sizes."""

    def register(inputs: Callable[[Draw], dict[str, Any]]) -> Callable[[Draw], dict[str, Any]]:
        TINY[name] = Tiny(name, config, inputs)
        return inputs

    return register
