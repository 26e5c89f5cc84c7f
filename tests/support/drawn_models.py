"""Lines of a random program: writes to tensors, attention, and calls of blocks; and how a whole case is drawn."""

# ruff: noqa: E501 - lines of the programs that are drawn are written as they will stand

from __future__ import annotations

from collections.abc import Callable

import torch
from drawn_programs import CLEAR, Case, Sketch, Skip, Source, copies, dtype_of, inputs_of, step
from drawn_steps import index_of
from hypothesis import assume
from hypothesis import strategies as st


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


@step(4)
def joined_and_attended(on: Sketch) -> str:
    """What models do with text and image: join queries, keys and values, turn them, attend, cut apart."""
    x = on.tensor(lambda t: t.ndim == 3 and t.shape[-1] in (6, 8, 12))
    batch, seq, c = on.shape(x)
    y = on.one([name for name, t in on.pool.items() if t.ndim == 3 and t.shape[0] == batch and t.shape[-1] == c])
    heads, other, width = on.one([1, 2] if c == 8 else [1, 3]), on.shape(y)[1], c
    first, second, cut = (x, y, seq) if on.some() else (y, x, other)
    size, total = width // heads, seq + other
    query, key, value, attended, one, two = (on.new() for _ in range(6))
    heads_of = [f"self.linears.l{c}_{c}({part}).unflatten(-1, ({heads}, -1))" for part in (first, second)]
    lines = [f"{name} = torch.cat([{', '.join(heads_of)}], dim=1)" for name in (query, key, value)]
    table = f"torch.arange({total * size}).view({total}, 1, {size}).cos()"
    pairs = f"{query}.reshape(*{query}.shape[:-1], -1, 2)"
    turned = [f"{query}.float() * {table} + {query}.neg() * 0.5", f"({query} * {table}).type_as({key})", f"{query} / 3 + {key}",
              f"{query}.flatten(2).unflatten(-1, ({heads}, -1))", f"F.gelu({query}).to({key}.dtype)", f"{query}[:, :{cut}]"]  # fmt: skip
    if size % 2 == 0:
        turned += [f"torch.stack([-{pairs}.unbind(-1)[1], {pairs}.unbind(-1)[0]], dim=-1).flatten(3) * {table}"] * 3
    lines += [f"{name} = {on.one(turned)}" for name in on.one([(query,), (query,), (attended,), ()])]
    masks = [
        "",
        "",
        "",
        ", is_causal=True",
        f", attn_mask=torch.ones({total}, {total}, dtype=torch.bool).tril(1)",
        ", scale=0.3",
    ]
    swapped = [f"{name}.{on.one(['transpose(1, 2)', 'permute(0, 2, 1, 3)'])}" for name in (query, key, value)]
    out = on.one([".transpose(1, 2).flatten(2)", f".permute(0, 2, 1, 3).reshape({batch}, -1, {c})"])
    lines.append(f"{attended} = F.scaled_dot_product_attention({', '.join(swapped)}{on.one(masks)}){out}")
    cuts = [f"{one}, {two} = {attended}.split([{cut}, {total - cut}], dim=1)",
            f"{one} = {attended}[:, :{cut}]; {two} = {attended}[:, {cut}:]",
            f"{one} = torch.cat([{attended}[:, :{cut}], {attended}[:, {cut}:]], dim=1); {two} = {attended}[:, 1:]"]  # fmt: skip
    return "; ".join([*lines, on.one(cuts)])


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
