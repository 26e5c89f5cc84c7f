"""Lines of a random program: what is done to the dims, the values and the layout of tensors."""

# ruff: noqa: E501 - lines of the programs that are drawn are written as they will stand

from __future__ import annotations

import re

from drawn_programs import Sketch, Skip, can_broadcast, dtype_of, step
from hypothesis import strategies as st


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
