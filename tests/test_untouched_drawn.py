"""Random programs on a mesh, untouched: each gives what it gives on one device, or one clear error.

A drawn module is a few lines of Python on a pool of named tensors: what models
do to tokens, and what none should. A line that one device would not run, or at
which rounding shows, is not taken, so what is compared is well defined.

The suite draws the same programs each time. By hand, other ones, as many as asked for, with statistics:

MESHDIFF_DRAWS=2000 python -m pytest tests/test_untouched_drawn.py -s
"""

# ruff: noqa: E501 - lines of the programs that are drawn are written as they will stand

from __future__ import annotations

import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

import meshdiff
from meshdiff import Layout, init_mesh, simulate
from meshdiff.simulation import unwrap
from meshdiff.untouched import parallelize

DRAWS = int(os.environ.get("MESHDIFF_DRAWS", 0))
OUTPUT, GRADIENT = 1e-5, 1e-4
"""Relative errors that pass, in float32."""
CLEAR = 1e-3
"""What is nearer than this to what it is compared with could fall on either side."""


# --- programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A forward: its lines, and what it returns."""

    lines: tuple[str, ...]
    returns: str

    def __str__(self) -> str:
        return "\n".join(
            f"    {line}" for line in ("def forward(self, hidden, text=None, rotary=None, mask=None):", *self.body)
        )

    @property
    def body(self) -> tuple[str, ...]:
        return tuple(f"    {line}" for line in (*self.lines, f"return {self.returns}"))


@dataclass(frozen=True)
class Case:
    """A module, what it is called with, and how many ranks share it."""

    sizes: tuple[int, int, int, int]
    """Batch, seq, channels and text length, 0 for no text."""
    rotary: bool
    mask: bool
    sources: tuple[Source, ...]
    """Of the module, then of its blocks, if it has any."""
    ranks: int
    gradient: bool
    other_values: bool
    """Whether the second call has other values, of the same shapes."""

    def __str__(self) -> str:
        batch, seq, channels, text = self.sizes
        given = f"hidden [{batch}, {seq}, {channels}], text {text}, rotary {self.rotary}, mask {self.mask}"
        return "\n".join(
            [f"{self.ranks} ranks, {given}, gradient {self.gradient}, other values {self.other_values}"]
            + [f"{name}:\n{source}" for name, source in zip(NAMES, self.sources, strict=False)]
            + [repr(self)]
        )


NAMES = ("Model", "First", "Second")


@cache
def weights(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * inputs + outputs)
    return (
        torch.randn(outputs, inputs, generator=generator) / inputs**0.5,
        torch.randn(outputs, generator=generator) / 5,
    )


class Program(nn.Module):
    """A module with the layers that its source names, `self.linears.l6_8` say, always with the same weights."""

    def __init__(self, source: Source, blocks: list[nn.Module]) -> None:
        super().__init__()
        names = sorted({"l2_2", "l3_3", *re.findall(r"self\.linears\.(l\d+_\d+)", str(source))})
        self.linears = nn.Module()
        for name in names:  # at least two, which make it a block
            weight, bias = weights(*map(int, name[1:].split("_")))
            linear = nn.Linear(*weight.T.shape, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            setattr(self.linears, name, linear)
        if blocks:
            self.blocks = nn.ModuleList(blocks)


def build(sources: tuple[Source, ...], double: bool = False) -> nn.Module:
    made = []
    for name, source in reversed(list(zip(NAMES, sources, strict=False))):
        namespace: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile("\n".join(("def forward(self, hidden, text=None, rotary=None, mask=None):", *source.body)),
                     f"<{name}>", "exec"), namespace)  # fmt: skip
        blocks = made[::-1] if name == NAMES[0] else []
        made.append(type(name, (Program,), {"forward": namespace["forward"]})(source, blocks))
    return made[-1].double() if double else made[-1]


def inputs_of(sizes: tuple[int, int, int, int], rotary: bool, mask: bool) -> dict[str, Tensor]:
    batch, seq, channels, text = sizes
    generator = torch.Generator().manual_seed(7)
    made = {"hidden": torch.randn(batch, seq, channels, generator=generator)}
    if text:
        made["text"] = torch.randn(batch, text, channels, generator=generator)
    if rotary:
        made["rotary"] = torch.randn(seq, channels, generator=generator).cos()
    if mask:
        made["mask"] = (torch.arange(seq) < torch.tensor([[seq - 1], [max(1, seq // 2)]])[:batch]).contiguous()
    return made


def copies(values: dict[str, Tensor], double: bool = False, gradient: bool = False) -> dict[str, Tensor]:
    made = {k: v.double() if double and v.is_floating_point() else v.clone() for k, v in values.items()}
    return {k: v.requires_grad_(gradient and v.is_floating_point()) for k, v in made.items()}


def loss(output: Any) -> Tensor:
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return sum(t.double().square().sum() for t in leaves)


def error(one: Tensor, expected: Tensor) -> float:
    """Relative; infinite if they cannot be compared."""
    if one.shape != expected.shape or (one.dtype != expected.dtype and not one.is_floating_point()):
        return float("inf")
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(one, expected) else float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    off = float((one.to(wide) - expected.to(wide)).abs().square().sum().sqrt())
    return off / max(1e-3, float(expected.to(wide).abs().square().sum().sqrt())) if off == off else float("inf")


# --- drawing ----------------------------------------------------------------------------------------------------------


class Skip(Exception):
    """This step does not fit these tensors."""


class Sketch:
    """A source while it is drawn, with the values that its lines leave on one device, in float32 and float64."""

    def __init__(self, draw: Callable, inputs: list[dict[str, Any]], gradient: bool) -> None:
        self.draw, self.inputs, self.gradient = draw, inputs, gradient
        self.lines: tuple[str, ...] = ()
        self.blocks: tuple[Source, ...] = ()
        self.discrete = False
        self.pool, self.exact = map(dict, inputs)
        self.touched = {"hidden"}  # what depends on the tokens
        self.reads: dict[int, str] = {}  # how to read the tokens of what a block returns
        self.count = 0
        self.writes = self.one([0, 0, 1, 1, 9])  # how many steps may write; what is noticed at one hides what is not

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def one(self, options: Any) -> Any:
        options = list(options)
        if not options:
            raise Skip
        return self.draw(st.sampled_from(options))

    def some(self, rarely: int = 2) -> bool:
        return self.integer(0, rarely - 1) == rarely - 1

    def tensor(self, fits: Callable[[Tensor], bool] = lambda t: True, dtype: str = "float") -> str:
        """The name of a tensor of the pool, mostly one that depends on the tokens."""
        named = [name for name, t in self.pool.items() if dtype_of(t) == dtype and fits(t)][::-1]
        touched = [name for name in named if name in self.touched]
        return self.one(touched if touched and not self.some(4) else named)

    def own(self, fits: Callable[[Tensor], bool] = lambda t: True) -> str:
        """The name of a tensor to write to, mostly one that the program has made."""
        inputs = self.inputs[0]
        if self.some(4) or all(name in inputs for name in self.pool):
            return self.tensor(fits)
        return self.one(
            [n for n, t in self.pool.items() if n not in inputs and dtype_of(t) == "float" and fits(t)][::-1]
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.pool[name].shape)

    def dim(self, name: str) -> int:
        """A dim of a tensor, from either end."""
        n = self.pool[name].ndim
        if not n:
            raise Skip
        d = self.integer(0, n - 1)
        return d - n if self.some(3) else d

    def new(self, name: str = "") -> str:
        """A name for a result: a new one, or now and then that of what it is made of."""
        if name and self.some(5):
            return name
        self.count += 1
        return f"x{self.count}"

    def like(self, shape: tuple[int, ...]) -> str:
        """An expression of the pool that broadcasts to a shape."""

        def fits(t: Tensor) -> bool:
            return can_broadcast(t.shape, shape)

        options = [n for n, t in self.pool.items() if dtype_of(t) == "float" and fits(t)]
        for name, t in self.pool.items():
            if dtype_of(t) != "float" or not t.ndim:
                continue
            derived = [f"{name}.mean({d}, keepdim=True)" for d in range(t.ndim)]
            derived += [f"{name}[..., :{shape[-1]}]", f"{name}[..., :1]", f"{name}.unsqueeze(0)"] if shape else []
            derived += [f"{name}[:, :{shape[1]}]", f"{name}[:, -{shape[1]}:]"] if len(shape) > 1 < t.ndim else []
            derived += [f"{name}.mT"] if t.ndim > 1 else []
            for text in derived:
                try:
                    if fits(eval(text, {}, {name: t})):
                        options.append(text)
                except (IndexError, RuntimeError):
                    continue
        return self.one(options)

    def clear(self, values: Tensor, dim: int) -> None:
        """Skip what rounding could put in another order."""
        ordered = values.sort(dim).values
        if values.shape[dim] > 1 and float(ordered.diff(dim=dim).abs().min()) < CLEAR:
            raise Skip
        self.discrete = True

    def step(self) -> None:
        """Try to add a line."""
        for _ in range(4):
            try:
                blocks = self.blocks
                chosen = self.one(STEPS if self.writes else PURE)
                if self.accept(chosen(self)):
                    self.writes -= self.writes > 0 and chosen not in PURE
                    return
                self.blocks = blocks
            except Skip:
                continue

    def accept(self, line: str) -> bool:
        """Take a line if one device runs it, and alike in float32 and float64."""
        lines = (*self.lines, line)
        try:
            found = [self.run(Source(lines, "locals()"), double) for double in (False, True)]
        except Exception:
            return False
        if any(not is_sound(found[0].get(name), value) for name, value in found[1].items() if name != "self"):
            return False
        for values in found:
            values.pop("self")
        self.lines, (self.pool, self.exact) = lines, found
        for statement in line.split("; "):
            target, _, expression = statement.partition(" = ")
            if any(used in self.touched for used in re.findall(r"\b(?:x\d+|hidden)\b", expression)):
                self.touched.update(re.findall(r"\b(?:x\d+)\b", target))
        self.pool = {name: value for name, value in self.pool.items() if isinstance(value, Tensor)}
        return True

    def run(self, source: Source, double: bool) -> dict[str, Any]:
        module = build((source, *self.blocks), double)
        with torch.enable_grad() if self.gradient else torch.no_grad():
            output = module(**copies(self.inputs[double], gradient=self.gradient))
            if self.gradient:
                total = loss([v for v in output.values() if isinstance(v, Tensor)])
                if total.requires_grad:
                    total.backward()
        return tree_map_only(Tensor, torch.detach, output)

    def returned(self) -> tuple[str, str]:
        """What to return, mostly what was made last, and how to read the first and second tensor of it."""
        last = [name for name in self.pool if dtype_of(self.pool[name]) != "none"][::-1]
        mine = [name for name in last if name in self.touched and dtype_of(self.pool[name]) == "float"] or last
        first, second = self.one(mine[:3]), self.one(last)
        several = ", ".join(last)
        return self.one(
            [
                (first, ""),
                (f"({several},)", "[0]"),
                (f"({first}, {second})", "[0]"),
                (f"[{first}, {second}]", "[0]"),
                (f'{{"sample": {first}, "others": ({second}, [{several}])}}', '["sample"]'),
            ]
        )


def dtype_of(value: Any) -> str:
    if not isinstance(value, Tensor) or value.numel() > 2500:
        return "none"
    return (
        "float"
        if value.is_floating_point()
        else "bool"
        if value.dtype == torch.bool
        else "complex"
        if value.is_complex()
        else "int"
    )


def can_broadcast(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def is_sound(value: Any, exact: Any) -> bool:
    """Whether a value is finite, not large, and what it would be without rounding."""
    if not isinstance(value, Tensor):
        return type(value) is type(exact)
    if value.numel() > 2500:
        return False
    if value.numel() and value.dtype != torch.bool and not float(value.abs().max()) < 1e3:
        return False
    return error(value, exact.to(value.dtype) if exact.is_floating_point() else exact) < 2e-6


# Each step takes a sketch and returns a line.
STEPS: list[Callable[[Sketch], str]] = []
PURE: list[Callable[[Sketch], str]] = []
"""Those that write to no tensor; half of the programs are made of these."""


def step(times: int = 1, *, writes: bool = False) -> Callable:
    def register(function: Callable[[Sketch], str]) -> Callable[[Sketch], str]:
        STEPS.extend([function] * times)
        PURE.extend([function] * times * (not writes))
        return function

    return register


@step(3)
def linear(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim and 1 < t.shape[-1] <= 24)
    return f"{on.new(x)} = self.linears.l{on.shape(x)[-1]}_{on.one([6, 8, 4, 12])}({x})"


@step(2)
def norm(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim)
    dims = on.one([f"{x}.shape[-1:]", f"{x}.shape[-1:]", f"{x}.shape[-2:]", f"{x}.shape[1:]"])
    return f"{on.new(x)} = " + on.one([f"F.layer_norm({x}, {dims})", f"F.rms_norm({x}, {dims})"])


@step(2)
def pointwise(on: Sketch) -> str:
    x = on.tensor()
    forms = ["F.gelu({0})", "{0} * 0.5 + 0.1", "F.silu({0})", "{0}.tanh()", "-{0}", "{0}.abs()", "{0}.clone()",
             "{0}.contiguous()", "torch.sin({0})", "1 - {0}", "{0}.clamp(min=-0.5)", "({0} > 0.1).to({0}.dtype) + {0}",
             "{0}.detach()", "{0}.to({0}.dtype)", "{0}.double()", "F.dropout({0}, 0.5, training=False)"]  # fmt: skip
    return f"{on.new(x)} = " + on.one(forms).format(x)


@step(3)
def binary(on: Sketch) -> str:
    x = on.tensor()
    y = on.like(on.shape(x))
    forms = ["{0} + {1}", "{0} * {1}", "{1} - {0}", "torch.maximum({0}, {1})", "{0} * (1 + {1}) + {1}",
             "torch.add({0}, {1}, alpha=2)", "torch.addcmul({0}, {0}, {1})", "torch.lerp({0}, {1}, 0.25)",
             "torch.where({0} > {1}, {0}, {1} * 0.5)"]  # fmt: skip
    return f"{on.new(x)} = " + on.one(forms).format(x, y)


@step(4)
def reshaped(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim)
    shape = list(on.shape(x))
    d = on.integer(0, len(shape) - 1)
    if on.some():  # split a dim
        factor = on.one([k for k in range(1, shape[d] + 1) if shape[d] % k == 0])
        parts = on.one([(factor, shape[d] // factor), (factor, -1), (-1, factor)])
        sizes = [*shape[:d], *parts, *shape[d + 1 :]]
        forms = [f"unflatten({d}, {parts})", f"reshape({sizes})", f"view({str(sizes)[1:-1]})"]
    elif on.some():
        sizes = on.one([[-1], [-1, shape[-1]], [shape[0], -1], [1, *shape], [*shape[:-1], 1, shape[-1]]])
        forms = [f"view({sizes})", f"reshape({sizes})"]
    else:
        end = on.integer(d, len(shape) - 1)
        sizes = [*shape[:d], -1, *shape[end + 1 :]]
        forms = [f"flatten({d}, {end})", f"reshape({sizes})", f"view({sizes})"]
    return f"{on.new(x)} = {x}.{on.one(forms)}"


@step(3)
def permuted(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim > 1)
    order = on.draw(st.permutations(range(len(on.shape(x)))))
    forms = [f"transpose({on.dim(x)}, {on.dim(x)})", f"permute({str(order)[1:-1]})", f"movedim({on.dim(x)}, {on.dim(x)})",
             f"unsqueeze({on.dim(x)})", "squeeze()", f"squeeze({on.dim(x)})", "mT", f"swapaxes({on.dim(x)}, 0)"]  # fmt: skip
    return f"{on.new(x)} = {x}.{on.one(forms)}"


@step(3)
def parts(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim)
    d = on.dim(x)
    length = on.shape(x)[d]
    cut = on.integer(0, length)
    call = on.one(
        [
            f"chunk({on.integer(1, 4)}, dim={d})",
            f"split({on.integer(1, max(1, length))}, dim={d})",
            f"split([{cut}, {length - cut}], {d})",
            f"unbind({d})",
            f"tensor_split({on.integer(1, 3)}, dim={d})",
        ]
    )
    try:
        number = len(eval(f"t.{call}", {}, {"t": on.pool[x]}))
    except RuntimeError as refused:
        raise Skip from refused
    if not 0 < number <= 4 or on.some(4):
        return on.one(
            [
                f"{on.new(x)} = {x}.{call}[{on.one([0, -1])}]",
                f"{on.new(x)} = torch.cat({x}.{call}[::-1], dim={d})",
                f"{on.new(x)} = torch.stack([part * (i + 1) for i, part in enumerate({x}.{call})])",
            ]
        )
    return ", ".join([on.new(x), *(on.new() for _ in range(number - 1)), ""][: number + (number == 1)]).strip() + (
        f" = {x}.{call}"
    )


def index_of(on: Sketch, shape: tuple[int, ...]) -> str:
    """An index of a tensor of that shape, as text."""
    if not shape:
        raise Skip

    def entry(length: int) -> str:
        a, b = on.integer(-length, length), on.integer(-length, length)
        kinds = ["slice", "slice", ":", ":", ":", "int", "step", "list", "bool", "None"]
        kind = on.one(kinds)
        if kind == ":":
            return ":"
        if kind == "slice":
            return on.one([f"{a}:", f":{b}", f"{a}:{b}", f"{abs(a)}:{abs(a) + 2}"])
        if kind == "int":
            return str(min(a, length - 1))
        if kind == "step":
            return f"{on.one(['', abs(a)])}::{on.integer(2, 3)}"
        if kind == "list":
            return str([on.integer(-length, length - 1) for _ in range(on.integer(1, 3))]) if length else ":"
        if kind == "bool":
            return f"torch.tensor({[bool((i + a) % 2) for i in range(length)]})"
        return "None, :"

    if on.some(3):  # one dim
        d = on.integer(0, len(shape) - 1)
        return (
            ", ".join([*[":"] * d, entry(shape[d])]) if on.some() or d < len(shape) - 1 else f"..., {entry(shape[d])}"
        )
    entries = [entry(length) for length in shape[: on.integer(1, len(shape))]]
    return ", ".join(entries)


@step(4)
def indexed(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim)
    return f"{on.new(x)} = {x}[{index_of(on, on.shape(x))}]"


@step(3)
def joined(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim)
    shape = on.shape(x)
    d = on.dim(x)
    others = [name for name, t in on.pool.items() if dtype_of(t) == "float" and t.ndim == len(shape) and
              all(a == b for i, (a, b) in enumerate(zip(t.shape, shape, strict=True)) if i != d % len(shape))]  # fmt: skip
    names = [x, *(on.one(others) for _ in range(on.integer(1, 2)))]
    names = names[::-1] if on.some() else names
    if all(on.shape(name) == shape for name in names) and on.some(3):
        return f"{on.new(x)} = torch.stack([{', '.join(names)}], dim={d})"
    return f"{on.new(x)} = torch.cat([{', '.join(names)}], dim={d})"


@step(2)
def picked(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim and t.numel())
    d = on.dim(x)
    length = on.shape(x)[d]
    start = on.integer(0, length - 1)
    places = [on.integer(0, length - 1) for _ in range(on.integer(1, 4))]
    forms = [f"{x}.narrow({d}, {start}, {on.integer(0, length - start)})", f"{x}.select({d}, {start})",
             f"torch.narrow({x}, {d}, {start}, {length - start})",
             f"{x}.index_select({d}, torch.tensor({places}))", f"torch.take_along_dim({x}, ({x} > 0.1).long(), {d})",
             f"torch.gather({x}, {d}, torch.zeros_like({x}, dtype=torch.long))"]  # fmt: skip
    return f"{on.new(x)} = {on.one(forms)}"


@step(2)
def moved(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim)
    d = on.dim(x)
    amounts = [on.integer(-1 if on.some(4) else 0, 3) for _ in range(2 * on.integer(1, len(on.shape(x))))]
    kind = on.one(["", "", ", value=0.5", ', mode="replicate"', ', mode="circular"', ', mode="reflect"'])
    return f"{on.new(x)} = " + on.one(
        [
            f"F.pad({x}, {amounts}{kind})",
            f"F.pad({x}, {(0,) * (2 * (-d - 1) if d < 0 else 0) + (on.integer(0, 2), on.integer(0, 2))})",
            f"{x}.roll({on.integer(-3, 3)}, {d})",
            f"torch.roll({x}, {on.integer(-3, 3)})",
            f"{x}.flip({d})",
            f"{x}.cumsum({d})",
            f"{x}.diff(dim={d})",
        ]
    )


@step(2)
def repeated(on: Sketch) -> str:
    x = on.tensor(lambda t: 0 < t.ndim < 5)
    d, n, times = on.dim(x), len(on.shape(x)), on.integer(1, 3)
    counts = [on.one([1, 1, 2]) for _ in range(n + on.some(3))]
    return f"{on.new(x)} = " + on.one(
        [
            f"{x}.repeat({str(counts)[1:-1]})",
            f"{x}.repeat_interleave({times}, dim={d})",
            f"{x}.unsqueeze({d}).expand({str([-1] * (d % (n + 1)) + [times] + [-1] * (n - d % (n + 1)))[1:-1]})",
            f"{x}.expand({times}, {str([-1] * n)[1:-1]})",
            f"{x}.mean({d}, keepdim=True).expand_as({x})",
            f"torch.tile({x}, ({times},))",
        ]
    )


@step(3)
def reduced(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim and t.numel())
    d = on.dim(x)
    keep = on.one([", keepdim=True", ""])
    call = on.one([f"mean({d}{keep})", f"sum({d}{keep})", f"amax({d}{keep})", f"softmax({d})", f"var({d}{keep})", "mean()",
                   f"std({d}, unbiased=False{keep})", f"norm(dim={d}{keep})", f"mean((0, {d}))", f"max({d}{keep})[0]",
                   f"min({d}{keep}).values", f"logsumexp({d})", f"prod({d}{keep})", "sum((0, -1))", "sum()",
                   f"log_softmax({d})", f"any({d})", f"argmax({d}{keep})", "max()", "argmin()"])  # fmt: skip
    if re.match("a?m(ax|in)|arg", call):
        on.clear(
            on.exact[x] if call[-3:-1] != ")(" and "()" not in call else on.exact[x].flatten(),
            d if "()" not in call else 0,
        )
    return f"{on.new()} = {x}.{call}"


@step(2)
def compared(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim and t.numel())
    y = on.like(on.shape(x))
    functions = [
        "F.mse_loss({0}, {1})",
        "F.l1_loss({0}, {1})",
        "torch.dist({0}, {1})",
        "F.cosine_similarity({0}, {1}, dim=-1)",
    ]
    return f"{on.new()} = " + on.one(functions).format(x, f"({y}).expand_as({x})")


@step()
def ordered(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim and t.numel())
    d = on.dim(x)
    on.clear(on.exact[x], d)
    k = on.integer(1, max(1, on.shape(x)[d]))
    return on.one(
        [
            f"{on.new(x)}, {on.new()} = {x}.topk({k}, dim={d})",
            f"{on.new(x)}, {on.new()} = {x}.sort({d})",
            f"{on.new(x)} = {x}.sort(dim={d}, descending=True).values",
            f"{on.new(x)} = torch.gather({x}, {d}, {x}.argsort({d}))",
            f"{on.new()} = {x}.argmax({d})",
            f"{on.new(x)} = {x}.index_select({d}, {x}.flatten()[:{on.shape(x)[d]}].argsort())",
        ]
    )


@step(2)
def masked(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim)
    shape = on.shape(x)
    masks = [f"{x} > 0.1"]
    for name, t in on.pool.items():
        if dtype_of(t) == "bool":
            masks += [text for text, s in ((name, t.shape), (f"{name}[..., None]", (*t.shape, 1)),
                                           (f"{name}[:, None]", (*t.shape[:1], 1, *t.shape[1:])))
                      if can_broadcast(s, shape)]  # fmt: skip
    m = on.one(masks[::-1])
    return f"{on.new(x)} = " + on.one(
        [
            f"{x}.masked_fill({m}, 0.5)",
            f"torch.where({m}, {x}, 0.0)",
            f"{x}[{m}]",
            f"{x} * ({m})",
            f"{x}.masked_select({m})",
            f"torch.where({m}, {x}, torch.zeros_like({x}))",
            f"torch.logical_and({m}, {x} < 1.5)",
            f"torch.nonzero({m})",
        ]
    )


@step()
def smaller(on: Sketch) -> str:
    x = on.tensor()
    return f"{x} = {x}.tanh()"


@step()
def forgotten(on: Sketch) -> str:
    if len(on.pool) < 4:
        raise Skip
    return f"del {on.tensor()}"


@step(5, writes=True)
def assigned(on: Sketch) -> str:
    x = on.own(lambda t: t.ndim)
    index = index_of(on, on.shape(x))
    part = f"{x}[{index}]"
    try:
        shape = tuple(eval(part, {"torch": torch}, {x: on.pool[x]}).shape)
    except (IndexError, RuntimeError, ValueError) as refused:
        raise Skip from refused
    value = on.one([lambda: on.like(shape), lambda: f"{part} * 0.5 + 1", lambda: "0.25", lambda: f"{part}.flip(0)",
                    lambda: f"torch.ones_like({part})"])()  # fmt: skip
    return on.one([f"{part} = {value}", f"{part} = {value}", f"{part} += {value}", f"{part}.mul_({value})",
                   f"{part}.copy_({value})", f"{part}.zero_()", f"{part}.add_(1.0)", f"{part} *= 0.5"])  # fmt: skip


@step(5, writes=True)
def written(on: Sketch) -> str:
    x = on.own()
    y = on.like(on.shape(x))
    d = on.integer(0, max(0, len(on.shape(x)) - 1))
    part = on.one([x, x, x, f"{x}.view(-1)", f"{x}.transpose(0, {d})", f"{x}.chunk(2, {d})[0]", f"{x}.detach()", f"{x}.data",
                   f"{x}.unsqueeze(0)", f"{x}.unbind({d})[-1]", f"{x}.narrow({d}, 0, 1)", f"{x}.select({d}, 0)",
                   f"{x}.flatten()", f"{x}.reshape(-1)", f"{x}.contiguous()", f"{x}[:, 1:][:, :2]", f"{x}.mT"])  # fmt: skip
    # Gradients of these are not those of one device beneath any mode of torch's, and a simulation is one.
    several = f"{x}.mul_(0.25)" if on.gradient else f"torch._foreach_mul_([{x}, {part}], 0.5)"
    return on.one([f"{part}.mul_(0.5)", f"{x} += {y}", f"{x} *= {y}", f"{part}.add_(1.0)", f"{x}.sub_({y})", f"{x}.copy_({y})",
                   f"{part}.zero_()", f"{part}.clamp_(-0.5, 0.5)", f"F.relu({x}, inplace=True)", f"{part}.fill_(0.3)",
                   f"{x}.masked_fill_({x} > 0.1, 0.5)", f"torch.mul({x}, 0.5, out={x})", f"{x}.lerp_({y}, 0.5)",
                   f"torch.add({x}, {y}, out={x})", several, f"{x}.addcmul_({x}, {y})",
                   f"{x}.sub_({x}.mean({d}, keepdim=True))", f"{part}.tanh_()", f"{x} = {x} * 0.5" if on.gradient else f"{x}.data = {x} * 0.5"])  # fmt: skip


@step(4, writes=True)
def viewed_and_written(on: Sketch) -> str:
    """A view and a write to one of the two: a view on one device may be a copy on shards."""
    x = on.own(lambda t: t.ndim > 1 and t.shape[1])
    y, z, length = on.new(), on.new(), on.shape(x)[1]
    start = on.integer(0, length - 1)
    view = on.one(
        [
            f"[:, {start}:]",
            f"[:, :{start + 1}]",
            f".narrow(1, {start}, {length - start})",
            f".chunk(2, 1)[{on.one([0, -1])}]",
            f".split([{start}, {length - start}], 1)[1]",
            f".select(1, {start})",
            f".unbind(1)[{start}]",
            f"[:, {start}]",
            f"[:, {start}:][..., 1:]",
            ".flatten(0, 1)",
            ".flatten()",
            ".reshape(-1)",
            f".transpose(0, 1)[{start}:]",
            f".unflatten(1, (-1, 1))[:, {start}:]",
            "[:, ::2]",
            ".expand(2, *(-1,) * " + f"{x}.ndim)",
        ]
    )
    source = on.one([x, f"({x} * 2)"])  # what is in use still, or not
    again = on.one(["", "", ".contiguous()", f".reshape(-1, {on.shape(x)[-1]})", ".flatten()", f".to({x}.dtype)"])
    target = on.one([x, y, z])
    write = on.one(
        [".mul_(0.5)", ".add_(1.0)", "[..., :2] = 0.25", "[:1] += 1", f".copy_({target}.flip(0))", "[[0, -1]] += 1"]
    )
    return f"{y} = {source}{view}; {z} = {y}{again}; {target}{write}"


@step(1, writes=True)
def reshaped_in_place(on: Sketch) -> str:
    x = on.own(lambda t: t.ndim > 1)
    d = on.dim(x)
    return on.one([f"{x}.unsqueeze_({d})", f"{x}.transpose_(0, {d})", f"{x}.squeeze_()", f"{x}.swapaxes_(-1, {d})"])


@step(4, writes=True)
def scattered(on: Sketch) -> str:
    x = on.own(lambda t: t.ndim and t.numel())
    d = on.dim(x)
    length = on.shape(x)[d]
    places = on.draw(st.permutations(range(length)))[: on.integer(1, length)]
    index = f"torch.tensor({places})"
    rows = f"{on.one([x, on.like(on.shape(x))])}.expand_as({x}).index_select({d}, {index})"
    wide = f"torch.zeros_like({x}, dtype=torch.long)"
    return on.one([f"{x}.index_add_({d}, {index}, {rows})", f"{x}.index_copy_({d}, {index}, {rows})",
                   f"{x}.index_fill_({d}, {index}, 0.5)", f"{x}.scatter_add_({d}, {wide}, {x}.clone())",
                   f"{x}.scatter_({d}, {wide}, 0.5)", f"{on.new()} = {x}.index_add({d}, {index}, {rows})",
                   f"{on.new()} = {x}.scatter_add({d}, {wide}, {x})", f"{on.new()} = torch.zeros_like({x}).index_copy({d}, {index}, {rows})",
                   f"{x}.scatter_reduce_({d}, {wide}, {x}.clone(), 'sum')"])  # fmt: skip


@step()
def built(on: Sketch) -> str:
    """A tensor that a program fills; the next steps write to it."""
    x = on.tensor(lambda t: t.ndim)
    return f"{on.new()} = " + on.one(
        [f"torch.zeros_like({x})", f"{x}.new_zeros({x}.shape)", f"torch.zeros({x}.shape, dtype={x}.dtype)", f"torch.ones_like({x})",
         f"{x}.new_full(({on.shape(x)[0]}, {on.shape(x)[-1]}), 0.5)", f"torch.arange({x}.shape[-1]).to({x}.dtype)",
         f"torch.linspace(0, 1, {x}.shape[0], dtype={x}.dtype)", f"torch.tensor({x}.shape) * torch.ones((), dtype={x}.dtype)"]
    )  # fmt: skip


@step()
def branched(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim and t.numel())
    if abs(float(on.exact[x].sum()) - 0.1) < CLEAR:
        raise Skip
    condition = on.one(
        [f"{x}.sum() > 0.1", f"float({x}.sum()) > 0.1", f"{x}.sum().item() > 0.1", f"bool(({x} > 0.1).any())"]
    )
    return f"{on.new(x)} = " + on.one(
        [
            f"{x} * 0.5 if {condition} else {x} + 1",
            f"{x}[:, :1] if {condition} else {x}[:, 1:]",
            f"{x}.flip(0) if {condition} else {x}.clone()",
            f"torch.stack([row * (1 + i) for i, row in enumerate({x})])",
            f"torch.tensor({x}.tolist(), dtype={x}.dtype)",
            f"{x} * len({x}) + {x}.stride(0) + {x}.storage_offset() + {x}.is_contiguous()",
        ]
    )


@step(5)
def attention(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim == 3 and t.shape[-1] in (6, 8, 12))
    batch, seq, c = on.shape(x)
    heads = on.one([1, 2] if c == 8 else [1, 2, 3])
    y = on.tensor(lambda t: t.ndim == 3 and t.shape[0] == batch and t.shape[-1] == c) if on.some() else x
    joint = on.one([name for name, t in on.pool.items() if t.ndim == 3 and t.shape[0] == batch and t.shape[-1] == c])
    kind = on.one(["self", "cross", "joint"])
    keys = on.shape(y)[1] if kind == "cross" else seq + (on.shape(joint)[1] if kind == "joint" else 0)
    split = f".unflatten(-1, ({heads}, -1)).transpose(1, 2)"
    layer = f"self.linears.l{c}_{c}"
    masks = ["", "", "", ", is_causal=True", ", scale=0.3", f", attn_mask=torch.ones({keys}, {keys}, dtype=torch.bool).tril()",
             f", attn_mask=torch.arange({keys}).to({x}.dtype) / 9"]  # fmt: skip
    masks += [f", attn_mask={name}[:, None, None, :]" for name, t in on.pool.items()
              if dtype_of(t) == "bool" and t.shape == (batch, keys)] * 3  # fmt: skip
    options = on.one(masks)
    out = on.one([".transpose(1, 2).flatten(2)", ".transpose(1, 2).flatten(2)", f".transpose(1, 2).reshape({batch}, -1, {c})",
                  ".permute(0, 2, 1, 3).flatten(2)", ""])  # fmt: skip
    if kind == "joint":
        both = on.one([f"torch.cat([{joint}, {x}], dim=1)", f"torch.cat([{x}, {joint}], dim=1)"])
        if on.some():
            fused = f"self.linears.l{c}_{3 * c}({both}).chunk(3, dim=-1)"
            call = f"F.scaled_dot_product_attention(*(part{split} for part in {fused}){options})"
        else:
            heads_of = f"{layer}({both}){split}"
            call = f"F.scaled_dot_product_attention({heads_of}, {heads_of}, {heads_of}{options})"
    else:
        of_keys = f"{layer}({y if kind == 'cross' else x}){split}"
        call = f"F.scaled_dot_product_attention({layer}({x}){split}, {of_keys}, {of_keys}{options})"
        if on.some(4):
            call = f"(({layer}({x}){split} @ {of_keys}.mT).softmax(-1) @ {of_keys})"
    return f"{on.new(x)} = {call}{out}"


@step()
def attention_as_it_comes(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim >= 2)
    y = on.tensor(lambda t: t.ndim >= 2 and t.shape[-1] == on.shape(x)[-1])
    return f"{on.new(x)} = F.scaled_dot_product_attention({x}, {y}, {y})"


@step(2)
def multiplied(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim >= 2)
    y = on.tensor(lambda t: t.ndim >= 2)
    letters = "abcdef"[: len(on.shape(x))]
    last = letters[-1]
    forms = [f"{x} @ {y}.mT", f"{x} @ {y}", f"torch.matmul({x}.mT, {y})", f"torch.einsum('...ij,...kj->...ik', {x}, {y})",
             f"torch.einsum('{letters},{letters}->{letters[:-1]}', {x}, {x})", f"torch.outer({x}.flatten()[:7], {x}.flatten()[:5])",
             f"torch.einsum('{letters},{last}->{letters[::-1]}', {x}, {x}.flatten()[:{on.shape(x)[-1]}])",
             f"torch.bmm({x}, {x}.mT)", f"torch.einsum('bic,bjc->bij', {x}, {y})", f"torch.einsum('bic,bid->bcd', {x}, {y})"]  # fmt: skip
    return f"{on.new()} = ({on.one(forms)}) * 0.2"


@step(2)
def rotated(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim >= 2 and t.shape[-1] % 2 == 0 and t.shape[-1])
    half = on.shape(x)[-1] // 2
    y = on.like(on.shape(x))
    pairs = f"torch.view_as_complex({x}.unflatten(-1, (-1, 2)).contiguous())"
    return f"{on.new(x)} = " + on.one(
        [
            f"{x} * {y} + torch.cat([-{x}[..., {half}:], {x}[..., :{half}]], dim=-1) * {y}",
            f"torch.stack([-{x}[..., 1::2], {x}[..., ::2]], dim=-1).flatten(-2) * {y}",
            f"torch.view_as_real({pairs} * torch.polar({y}[..., :1].abs(), {y}[..., :1])).flatten(-2)",
            f"torch.view_as_real({pairs} * torch.tensor(1j)).flatten(-2)",
        ]
    )


@step()
def convolved(on: Sketch) -> str:
    x = on.tensor(lambda t: t.ndim == 3 and t.shape[-1] >= 2)
    c = on.shape(x)[-1]
    weight = f"self.linears.l{c}_6.weight[:, :, None]"
    return f"{on.new(x)} = " + on.one(
        [
            f"F.conv1d({x}.mT, {weight}).mT",
            f"F.avg_pool1d({x}, 2)",
            f"F.interpolate({x}, scale_factor=2)",
            f"F.group_norm({x}.mT, 2).mT",
            f"F.glu({x}, dim={on.dim(x)})",
            f"F.embedding(({x} > 0.1).long().argmax(-1), self.linears.l{c}_6.weight)",
        ]
    )


def block_called(on: Sketch) -> str:
    """A line that calls a block, which is drawn for what it is called with; or one that is there already."""
    x = on.tensor(lambda t: t.ndim >= 2 and t.numel())
    others = [name for name in on.pool if name != x]
    named = {key: on.one([key] if key in on.pool else others) for key in ("text", "rotary", "mask")
             if others and (key in on.pool or on.some(4))}  # fmt: skip
    arguments = ", ".join([x, *(f"{key}={value}" for key, value in named.items())])
    if on.blocks and (len(on.blocks) == 2 or on.some(4)):
        place = on.integer(0, len(on.blocks) - 1)
        return f"{on.new(x)} = self.blocks[{place}]({arguments}){on.reads[place]}"
    inputs = [
        {"hidden": values[x], **{key: values[value] for key, value in named.items()}} for values in (on.pool, on.exact)
    ]
    inside = Sketch(on.draw, [copies(values) for values in inputs], on.gradient)
    for _ in range(on.integer(2, 7)):
        inside.step()
    returns, read = inside.returned()
    place = len(on.blocks)
    on.blocks = (*on.blocks, Source(inside.lines, returns))
    on.reads[place] = read
    on.discrete |= inside.discrete
    return f"{on.new(x)} = self.blocks[{place}]({arguments}){read}"


@st.composite
def cases(draw: Callable) -> Case:
    sizes = (
        draw(st.integers(1, 2)),
        draw(st.integers(3, 11)),
        draw(st.sampled_from([6, 8])),
        draw(st.integers(0, 5)),
    )
    rotary, mask, gradient = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 3)) == 3
    inputs = inputs_of(sizes, rotary, mask)
    on = Sketch(draw, [inputs, copies(inputs, double=True)], gradient)
    if draw(st.booleans()):
        for _ in range(draw(st.integers(3, 12))):
            on.step()
    else:
        for _ in range(2):
            for _ in range(draw(st.integers(0, 2))):
                on.step()
            for _ in range(3):
                blocks = on.blocks
                try:
                    if on.accept(block_called(on)):
                        break
                except Skip:
                    pass
                on.blocks = blocks
        for _ in range(draw(st.integers(0, 2))):
            on.step()
        assume(on.blocks)
    returns, _ = on.returned()
    other_values = not on.discrete and not gradient and draw(st.booleans())
    ranks = draw(st.integers(2, 4))
    return Case(sizes, rotary, mask, (Source(on.lines, returns), *on.blocks), ranks, gradient, other_values)


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """What a call leaves."""

    output: Any
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def call(module: nn.Module, run: Callable, inputs: dict[str, Tensor], gradient: bool) -> Call:
    module.zero_grad()
    with torch.enable_grad() if gradient else torch.no_grad():
        output = run(**inputs)
        if gradient:
            total = loss(output)
            if total.requires_grad:
                total.backward()
    leaves = [*module.named_parameters(), *inputs.items()] if gradient else []
    gradients = {name: tensor.grad for name, tensor in leaves}
    made = (*tree_map_only(Tensor, torch.detach, (output, inputs)), gradients)
    return Call(*tree_map_only(Tensor, lambda t: unwrap(t).clone(), made))


def is_well_posed(expected: Call, exact: Call) -> bool:
    """Whether float32 is near enough to float64 for a difference from it to mean anything."""
    pairs = zip(tree_leaves(expected.output), tree_leaves(exact.output), strict=True)
    far = any(isinstance(one, Tensor) and error(one, other) > 2e-6 for one, other in pairs)
    grads = [(one, exact.gradients[name]) for name, one in expected.gradients.items() if one is not None]
    return not far and all(error(one, other) < 1e-5 for one, other in grads)


def check(got: Call, expected: Call) -> None:
    leaves, structure = tree_flatten(got.output)
    expected_leaves, expected_structure = tree_flatten(expected.output)
    assert structure == expected_structure, "the output has another structure"
    for one, other in zip(leaves, expected_leaves, strict=True):
        if not isinstance(other, Tensor):
            assert one == other
            continue
        assert type(one) is Tensor, f"the output has {type(one)}, {one.dtype}"
        assert one.dtype == other.dtype, f"the output has {type(one)}, {one.dtype}"
        assert one.shape == other.shape, f"an output is {tuple(one.shape)} instead of {tuple(other.shape)}"
        assert error(one, other) <= OUTPUT, f"an output is off by {error(one, other):.1e}"
    for name, other in expected.inputs.items():
        assert error(got.inputs[name], other) <= OUTPUT, f"the caller's {name} is off"
    for name, other in expected.gradients.items():
        one = got.gradients[name]
        assert (one is None) == (other is None), f"the gradient of {name} is {one} instead of {other}"
        assert one is None or (type(one) is Tensor and error(one, other) <= GRADIENT), (
            f"the gradient of {name} is off by {error(one, other):.1e}"
        )


def is_clear(refusal: Exception) -> bool:
    """One line, from meshdiff."""
    last = traceback.extract_tb(refusal.__traceback__)[-1].filename
    ours = Path(last).is_relative_to(Path(meshdiff.__file__).parent)
    return type(refusal) is RuntimeError and ours and "\n" not in str(refusal)


class Statistics(Counter):
    """How draws came out."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def __str__(self) -> str:
        total = max(1, sum(self.values()))
        counts = ", ".join(f"{kind} {count} ({100 * count / total:.0f}%)" for kind, count in self.most_common())
        return f"{total} draws: {counts}; {sum(self.shares) / max(1, len(self.shares)):.0%} of FLOPs on shards"


def outcome(case: Case, statistics: Statistics) -> str:
    """How a case came out: "on shards", "blocks whole", "whole", "refused", or "ill-posed", of which nothing is known."""
    module = build(case.sources)
    inputs = inputs_of(case.sizes, case.rotary, case.mask)
    second = {k: v * -0.7 if case.other_values and v.is_floating_point() else v for k, v in inputs.items()}
    expected = []
    for values in (inputs, second):
        try:
            plain = call(module, module, copies(values, gradient=case.gradient), case.gradient)
        except Exception:  # its own, with other values
            return "ill-posed"
        twin = build(case.sources, double=True)
        if not is_well_posed(plain, call(twin, twin, copies(values, True, case.gradient), case.gradient)):
            return "ill-posed"
        expected.append(plain)
    module.zero_grad()
    given = [copies(values, gradient=case.gradient) for values in (inputs, second)]
    with simulate(case.ranks):
        handle = parallelize(module, init_mesh(Layout(1, case.ranks), "cpu")["cp"])
        for values, plain in zip(given, expected, strict=True):
            try:
                got = call(module, handle, values, case.gradient)
            except Exception as refusal:
                if is_clear(refusal):
                    return "refused"
                raise
            check(got, plain)
    if handle.whole:
        return "whole" if "" in handle.whole else "blocks whole"
    report = handle.report()
    if sum(block.flops_sharded + block.flops_replicated for block in report.blocks):
        statistics.shares.append(report.sharded_share)
    return "on shards" if any(block.sharded for block in report.blocks) else "nothing to share"


@contextmanager
def explained(case: Case) -> Iterator[None]:
    try:
        yield
    except Exception as failure:
        failure.add_note(str(case))
        raise


@pytest.fixture(scope="module")
def statistics():
    counted = Statistics()
    yield counted
    if DRAWS:
        print(f"\n{counted}")


@settings(
    max_examples=DRAWS or 200,
    deadline=None,
    derandomize=not DRAWS,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(case=cases())
def test_a_drawn_program_is_itself_on_a_mesh_or_says_clearly_that_it_cannot_be(case, statistics):
    with explained(case):
        kind = outcome(case, statistics)
    statistics[kind] += 1
