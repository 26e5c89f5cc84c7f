"""Weights from safetensors files, checked against the module that takes them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from meshdiff.errors import InputError

__all__ = ["load_weights"]


def load_weights(module: nn.Module, path: Path, flag: str = "--weights") -> None:
    """Fill `module` from a safetensors file, converted to the module's own dtypes.

    Args:
        module: takes the tensors; parameters on the meta device are not supported.
        path: the file.
        flag: what to name in an error.

    Raises:
        InputError: if the file is missing or broken, or its tensors are not
            those of the module, or not finite floating-point numbers.
    """
    try:
        if not path.is_file():
            raise InputError(flag, f"no such file: {path}")
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(flag, f"{path} cannot be read as safetensors ({error})") from error
    expected = module.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    misshaped = [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    problems = [
        f"{kind}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise InputError(flag, f"{path} does not fit this model; tensors {'; '.join(problems)}")
    broken = [name for name, tensor in tensors.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if broken:
        raise InputError(flag, f"{path} is damaged: {', '.join(broken[:4])} not made of finite numbers")
    with torch.no_grad():
        module.load_state_dict(tensors)
