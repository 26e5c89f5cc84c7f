"""Weights from safetensors files, checked against the module that takes them.

Files are memory-mapped: a tensor is read when it is copied to where it is
needed, in the dtype it is needed in, so a model takes no more host memory than
its parameters do. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from meshdiff.errors import InputError

__all__ = ["Source", "WeightFiles", "fill", "find_weights", "load_weights"]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """The tensors that a parameter is made of.

    Attributes:
        names: tensors in the files, stacked one below the other.
        convert: function applied to each of them; may not change its number of elements.
    """

    names: tuple[str, ...]
    convert: Callable[[Tensor], Tensor] = _as_it_is


class WeightFiles:
    """The tensors of one or several safetensors files, by name.

    Args:
        paths: the files.
        flag: the flag to name in an error.

    Raises:
        InputError: if a file is missing, truncated or something else.
    """

    def __init__(self, paths: Iterable[Path], flag: str) -> None:
        self.flag = flag
        self.paths = list(paths)
        self._files: dict[str, Any] = {}
        for path in self.paths:
            try:
                if not path.is_file():
                    raise InputError(flag, f"no such file: {path}")
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(flag, f"{path} cannot be read as safetensors ({error})") from error
            twice = sorted(self._files.keys() & file.keys())
            if twice:
                raise InputError(flag, f"{path} holds {twice[0]}, as another file beside it does")
            self._files.update(dict.fromkeys(file.keys(), file))

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, from the file's header."""
        return list(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor as a view of the file."""
        return self._files[name].get_tensor(name)

    def _no_numbers(self, names: Iterable[str]) -> list[str]:
        """The tensors that are not floating-point, for instance quantized ones, whose scales would be lost."""
        dtypes = {name: self._files[name].get_slice(name).get_dtype() for name in names if name in self._files}
        return [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in ("F64", "F32", "F16", "BF16")]

    def check(self, module: nn.Module, sources: Mapping[str, Source]) -> None:
        """Raise one `InputError` that lists tensors that are missing, unexpected, of another shape or not of floats."""
        expected = module.state_dict()
        needed = [name for source in sources.values() for name in source.names]
        misshaped = []
        for parameter, source in sources.items():
            if self.names.issuperset(source.names):
                shapes = [self.shape(name) for name in source.names]
                if not _fits(expected[parameter], source, shapes):
                    parts = " + ".join(f"{name} {shape}" for name, shape in zip(source.names, shapes, strict=True))
                    misshaped.append(f"{parts} instead of {list(expected[parameter].shape)}")
        problems = [
            f"{kind}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for kind, names in (
                ("missing", sorted(set(needed) - self.names)),
                ("unexpected", sorted(self.names - set(needed))),
                ("of another shape", sorted(misshaped)),
                ("of a kind that is no floating-point number", sorted(self._no_numbers(needed))),
            )
            if names
        ]
        if problems:
            where = self.paths[0] if len(self.paths) == 1 else self.paths[0].parent
            raise InputError(self.flag, f"{where} does not fit this model; tensors {'; '.join(problems)}")


def _fits(parameter: Tensor, source: Source, shapes: list[list[int]]) -> bool:
    try:
        parts = [source.convert(torch.empty(shape, device="meta")) for shape in shapes]
    except Exception:  # whatever a conversion says of a shape it is not made for
        return False
    return torch.cat(parts).shape == parameter.shape if len(parts) > 1 else parts[0].shape == parameter.shape


def find_weights(folder: Path, flag: str, stem: str = "diffusion_pytorch_model") -> WeightFiles:
    """The weights in a folder: `<stem>.safetensors`, or the shards that `<stem>.safetensors.index.json` lists.

    Raises:
        InputError: if there are none, or none but pickled ones.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = _shards(index, flag)
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise InputError(flag, f"{folder} lacks {', '.join(missing)}, which its index lists; copy the folder again")
        return WeightFiles([folder / shard for shard in shards], flag)
    if single.is_file():
        return WeightFiles([single], flag)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            flag, f"{folder} holds {pickled[0]}, which would have to be unpickled; only safetensors files are read"
        )
    raise InputError(flag, f"{folder} holds neither {single.name} nor {index.name}")


def _shards(index: Path, flag: str) -> list[str]:
    """The files that an index names, all of them beside it."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not shards or any(Path(shard).name != shard or len(shard) > 255 for shard in shards):
            raise ValueError("it has to name files beside it")
        return sorted(shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise InputError(flag, f"{index} is no index of safetensors files ({error})") from error


@torch.no_grad()
def fill(
    module: nn.Module,
    names: Iterable[str],
    weights: WeightFiles,
    sources: Mapping[str, Source],
    device: torch.device | str,
    dtype: Callable[[str], torch.dtype],
) -> None:
    """Replace parameters of `module` by new ones from files.

    Args:
        module: its parameters may be on the meta device.
        names: of the parameters.
        weights: checked.
        sources: of each parameter, by its name in `module`.
        device: device of the new parameters.
        dtype: of a parameter, by its name.

    Raises:
        InputError: for a tensor that is not made of finite numbers.
    """
    for name in names:
        parameter = module.get_parameter(name)
        value = torch.empty(parameter.shape, dtype=dtype(name), device=device)
        parts = sources[name].names
        # A parameter may be stacked of several tensors, which need not be equally tall.
        rows = [weights.shape(part)[0] for part in parts] if len(parts) > 1 else [len(value)]
        for place, part in zip(value.split(rows), parts, strict=True):
            place.copy_(sources[name].convert(weights.read(part)))
        if not value.isfinite().all():
            raise InputError(
                weights.flag, f"{', '.join(parts)} in {weights.paths[0].parent} not made of finite numbers"
            )
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=parameter.requires_grad))


def load_weights(module: nn.Module, path: Path, flag: str = "--weights") -> None:
    """Fill `module` from a safetensors file with tensors of the same names, on the CPU, in the module's own dtypes.

    Raises:
        InputError: if the file is missing or broken, or its tensors are not
            those of the module, or not finite floating-point numbers.
    """
    weights = WeightFiles([path], flag)
    sources = {name: Source((name,)) for name in module.state_dict()}
    weights.check(module, sources)
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    fill(module, dtypes, weights, sources, "cpu", dtypes.__getitem__)
