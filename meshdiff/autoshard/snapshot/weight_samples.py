"""A few values of each weight, in which a write shows that torch does not count, as to `weight.data`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshdiff.autoshard.snapshot.code_state import PLAIN_TENSORS
from meshdiff.distributed.simulation import outside, rank_values

__all__ = ["SAMPLE", "WeightSamples"]

SAMPLE = 8
"""Values of a weight."""


class WeightSamples:
    """The first values of weights, a few of each, by the device and dtype that they are of.

    Attributes:
        values: by kind, those of all weights of that kind, as bytes.
        places: by weight, its kind and where its values are among these.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        self.places: dict[int, tuple[Any, int, int]] = {}
        self._first: dict[Any, list[Tensor]] = {}
        self._plain: list[Tensor] = []
        ends: dict[Any, int] = {}
        with outside(), torch.no_grad():
            for weight in weights:
                tensor = rank_values(weight)[0]
                if _is_plain(tensor) and tensor.numel():
                    first = tensor.as_strided((min(SAMPLE, tensor.numel()) if tensor.is_contiguous() else 1,), (1,))
                    kind = tensor.device, tensor.dtype
                    self._plain.append(tensor)
                    self._first.setdefault(kind, []).append(first)
                    start = ends.get(kind, 0)
                    ends[kind] = start + first.numel() * tensor.element_size()
                    self.places[id(weight)] = kind, start, ends[kind]
        self._pointers = [tensor.data_ptr() for tensor in self._plain]
        self.values = self._read()

    def _read(self) -> dict[Any, Tensor]:
        with outside(), torch.no_grad():
            return {kind: torch.cat(firsts).view(torch.uint8) for kind, firsts in self._first.items()}

    def still(self) -> bool:
        """True if weights are in the same memory as before, with the same sampled values."""
        with outside():
            return [tensor.data_ptr() for tensor in self._plain] == self._pointers and all(
                torch.equal(self.values[kind], values) for kind, values in self._read().items()
            )

    def differing(self, now: WeightSamples) -> set[int]:
        """The weights (by `id`) of both that have other values in `now`; those that were moved are not compared."""
        with outside():
            if self.places == now.places and all(
                torch.equal(values, now.values[kind]) for kind, values in self.values.items()
            ):
                return set()
            return {
                key
                for key, (kind, start, stop) in self.places.items()
                if now.places.get(key, (None,))[0] == kind
                and not torch.equal(self.values[kind][start:stop], now.values[kind][slice(*now.places[key][1:])])
            }


def _is_plain(tensor: Tensor) -> bool:
    """True if its values can be read in place; for quantized and nested tensors that crashes."""
    plain = type(tensor) in PLAIN_TENSORS and tensor.layout == torch.strided
    return plain and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
