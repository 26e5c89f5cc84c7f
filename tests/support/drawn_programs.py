"""Random programs: modules of a few lines of Python, and a sketch of one while it is drawn.

What a line may be is in drawn_steps.py and drawn_models.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

CLEAR = 1e-3
"""What is nearer than this to what it is compared with could fall on either side."""


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
