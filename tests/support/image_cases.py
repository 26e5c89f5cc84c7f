"""Programs on the rows of images, and what it takes to run them on a mesh and on one device."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from meshdiff import CommsCounter, Layout, init_mesh, parallelize
from meshdiff.autoshard.numerics import difference
from meshdiff.distributed.consensus import all_gather_object
from meshdiff.distributed.simulation import outside, unwrap
from meshdiff.integrations.diffusers import HEIGHT


@dataclass(frozen=True)
class Program:
    """A function of one tensor.

    Attributes:
        shape: of the tensor.
        run: the function; what it returns has rows for the ranks to share.
        code: its name and options, to read.
    """

    shape: tuple[int, ...]
    run: Callable[[Tensor], Tensor]
    code: str


class Running(nn.Module):
    """A program as a module."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, images: Tensor) -> Tensor:
        return self.program.run(images)


def randn(*shape: int, seed: int = 0) -> Tensor:
    with outside():
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_mesh(program: Program, mesh: Any) -> tuple[float, list[str], dict[str, Any]]:
    """The error of three calls, what ran on replicated tensors, and the traffic of the last one."""
    images, model = randn(*program.shape), Running(program)
    parallel = parallelize(model, mesh, dim=HEIGHT)
    with torch.no_grad():
        made = [unwrap(model(images)) for _ in range(2)]
        with CommsCounter(mesh) as comms:
            made.append(unwrap(model(images)))
        with outside():
            expected = program.run(images)
    errors = [difference(one, expected) for one in made]
    replicated = [*parallel.replicated_kinds, *(row["function"] for row in parallel.report().gathers())]
    return max(errors), replicated, comms.as_dict().get("cp", {})


def drawn(seed: int) -> Program:
    """A program by chance."""
    chance = random.Random(seed)
    return chance.choice(KINDS)(chance)


def _images(chance: random.Random, dims: int, channels: int, least: int = 1) -> tuple[int, ...]:
    """A shape whose height is seldom divided by the ranks."""
    sizes = [chance.randint(max(least, 2), max(least, 2) + 5) for _ in range(dims)]
    if dims > 1:
        sizes[-2] = chance.randint(max(least, 5), max(least, 5) + 9)
    return (chance.randint(1, 2), channels, *sizes)


def _convolution(chance: random.Random) -> Program:
    dims, groups = chance.choice((2, 2, 3)), chance.choice((1, 1, 2))
    kernel = [chance.randint(1, 4) for _ in range(dims)]
    options: dict[str, Any] = {
        "stride": chance.randint(1, 3) if chance.random() < 0.5 else [chance.randint(1, 3) for _ in range(dims)],
        "padding": [chance.randint(0, 2) for _ in range(dims)],
        "dilation": chance.randint(1, 2),
        "groups": groups,
    }
    if chance.random() < 0.2:
        kernel = [chance.choice((1, 3)) for _ in range(dims)]
        options |= {"stride": 1, "padding": chance.choice(("same", "valid"))}
    weight = randn(2 * groups, 4 // groups, *kernel, seed=1)
    bias = randn(2 * groups, seed=2) if chance.random() < 0.5 else None
    function, shape = getattr(F, f"conv{dims}d"), _images(chance, dims, 4, least=8)
    if chance.random() < 0.4:  # zeros before it, that need not move
        pad = [chance.randint(0, 2) for _ in range(2 * dims)]
        return Program(shape, lambda x: function(F.pad(x, pad), weight, bias, **options), f"pad {pad}, conv {options}")
    return Program(shape, lambda x: function(x, weight, bias, **options), f"conv {kernel} {options}")


def _transposed(chance: random.Random) -> Program:
    dims, groups, step = chance.choice((2, 3)), chance.choice((1, 2)), chance.randint(1, 3)
    kernel = [chance.randint(1, 4) for _ in range(dims)]
    dilation = chance.randint(1, 2)
    options = {
        "stride": step,
        "padding": chance.randint(0, min(1, dilation * (min(kernel) - 1))),
        "output_padding": chance.randint(0, max(step, dilation) - 1),
        "groups": groups,
        "dilation": dilation,
    }
    weight, function = randn(4, 2, *kernel, seed=1), getattr(F, f"conv_transpose{dims}d")
    return Program(
        _images(chance, dims, 4, least=3),
        lambda x: function(x, weight, None, **options),
        f"transposed {kernel} {options}",
    )


def _padding(chance: random.Random) -> Program:
    dims, mode = chance.choice((2, 3)), chance.choice(("constant", "replicate", "reflect"))
    pad = [chance.randint(0, 2) for _ in range(2 * dims)]
    return Program(_images(chance, dims, 3, least=4), lambda x: F.pad(x, pad, mode) + 1, f"pad {pad} {mode}")


def _resizing(chance: random.Random) -> Program:
    dims, mode = chance.choice((2, 3)), chance.choice(("nearest", "nearest-exact"))
    shape = _images(chance, dims, 3, least=4)
    options: dict[str, Any] = {"scale_factor": chance.choice((2, 3, 2.0))}
    if chance.random() < 0.5:
        options = {"size": [chance.randint(4, 20) for _ in range(dims)]}
    return Program(shape, lambda x: F.interpolate(x, mode=mode, **options), f"interpolate {options} {mode}")


def _pooling(chance: random.Random) -> Program:
    dims, kernel, stride = chance.choice((2, 3)), chance.randint(1, 3), chance.choice((None, 1, 2))
    pool = getattr(nn, f"AvgPool{dims}d")(kernel, stride)
    return Program(_images(chance, dims, 3, least=4), pool, f"pool {kernel} {stride}")


def _shuffling(chance: random.Random) -> Program:
    factor, height, width = chance.choice((2, 3)), chance.randint(5, 9), chance.randint(2, 4)
    if chance.random() < 0.5:
        return Program((1, 2 * factor**2, height, width), lambda x: F.pixel_shuffle(x, factor), f"shuffle {factor}")
    shape = 1, 2, height * factor, width * factor
    return Program(shape, lambda x: F.pixel_unshuffle(x, factor), f"unshuffle {factor}")


def _norm(chance: random.Random) -> Program:
    weight, bias, mean = randn(4, seed=1), randn(4, seed=2), chance.choice((0.0, 100.0))
    shape = _images(chance, chance.choice((2, 3)), 4)
    if chance.random() < 0.3:
        variance = weight.abs() + 0.1
        return Program(shape, lambda x: F.batch_norm(x, bias, variance, weight, bias), "batch norm")
    groups = chance.choice((1, 2, 4))
    return Program(shape, lambda x: F.group_norm(x + mean, groups, weight, bias), f"group norm {groups}, mean {mean}")


def _reshaping(chance: random.Random) -> Program:
    frames, height, width = chance.randint(1, 3), chance.randint(4, 9), chance.randint(2, 4)
    shape = 1, 3, frames, height, width
    kind = chance.randrange(4)
    if kind == 0:  # to tokens and back
        return Program(
            shape,
            lambda x: x.flatten(2).transpose(1, 2).reshape(1, frames, height, width, 3).permute(0, 4, 1, 2, 3) * 2,
            "tokens",
        )
    if kind == 1:  # space to depth
        return Program(
            (1, 3, 2 * height, 2 * width),
            lambda x: x.view(1, 3, height, 2, width, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 12, height, width) * 2,
            "space to depth",
        )
    if kind == 2:  # depth to space
        return Program(
            (1, 12, height, width),
            lambda x: x.view(1, 3, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3).reshape(1, 3, 2 * height, 2 * width),
            "depth to space",
        )
    return Program(
        shape, lambda x: (x.permute(0, 2, 1, 3, 4).flatten(0, 1) * 2).unflatten(0, (1, -1)), "frames as batch"
    )


KINDS = (_convolution, _convolution, _transposed, _padding, _resizing, _pooling, _shuffling, _norm, _reshaping)


def on_ranks(seeds: range) -> list[dict[int, Any]]:
    """What came of programs, on every rank."""
    mesh = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"]
    return all_gather_object({seed: on_mesh(drawn(seed), mesh) for seed in seeds})
