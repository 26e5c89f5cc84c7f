"""Calls that run as captured graphs: the outputs of the model, whatever its Python does, or no graph, and why."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from unseen import unseen

from meshdiff import Layout, init_mesh, parallelize
from meshdiff.autoshard.numerics import difference
from tests.autoshard.test_calls import BODIES, CALLS, Tokens
from tests.autoshard.test_parallelize import Joint

ELSEWHERE: dict[int, Tensor] = {}
NUMBERS: dict[int, float] = {}


RAN = unseen(times=0, by_model=Counter[int]())
"""The number of times that the Python of a model ran on this rank."""


def body(block, x, y):
    return F.silu(y) * block.settings["factor"] + torch.cat([x[:, 3:], y[:, :3]], dim=1)


class Model(Tokens):
    """Blocks with this body, and `outside` of them a number, or a tensor, that depends on the tokens in some way."""

    def __init__(self, outside: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__(body)
        self.outside, self.scale = outside, nn.Parameter(torch.ones(1), requires_grad=False)
        for block in self.blocks:
            block.settings = {"factor": 2.0}

    def forward(self, hidden: Tensor, by: float = 1.0, other: Tensor | None = None) -> dict[str, Any]:
        RAN.get().times += 1
        factor = self.outside(self, hidden)
        hidden = super().forward(hidden) * factor * self.scale * by
        return {"sample": hidden if other is None else hidden + other, "by": by, "none": None}


def nothing(model, tokens):
    return 1.0


def item(model, tokens):
    return tokens.mean().item()


def choice(model, tokens):
    return 2.0 if tokens.mean() > 0 else 3.0


def nan_in_places(model, tokens):
    return torch.where(tokens[..., :1] > 0, float("nan"), 1.0)


def numbers(model, tokens):
    return sum(tokens[0, 0].tolist())


def array(model, tokens):
    return float(tokens.numpy().sum())


def tensor_of_tensors(model, tokens):
    return torch.tensor([tokens.sum(), tokens.mean()]).sum()


def what_is_true(model, tokens):
    return tokens[tokens > 0].sum()


def equality(model, tokens):
    return 2.0 if torch.equal(tokens, tokens.abs()) else 3.0


def by_number(model, tokens):
    return tokens[:, torch.tensor([1, 0])].sum()


def chance(model, tokens):
    torch.manual_seed(3)
    return F.dropout(tokens, 0.5, True).sum()


def state(model, tokens):
    model.last, last = tokens.mean(), getattr(model, "last", tokens.mean())
    return last


def buffer(model, tokens):
    model.blocks[0].attn_in.bias.mul_(1.01)
    return tokens.mean()


def input_(model, tokens):
    return tokens.add_(1).mean()


def a_global(model, tokens):
    RAN.get().by_model[id(model)] += 1
    return float(RAN.get().by_model[id(model)])


def unseeded(model, tokens):
    return F.dropout(tokens, 0.5, True).sum()


def elsewhere(model, tokens):
    return ELSEWHERE.setdefault(id(model), torch.zeros(1)).add_(1)


def iterator(model, tokens):
    model.numbers = getattr(model, "numbers", None) or itertools.count()
    return float(next(model.numbers))


def generator(model, tokens):
    model.generator = getattr(model, "generator", None) or torch.Generator().manual_seed(1)
    return torch.rand(1, generator=model.generator)


class Holder:
    def __init__(self, held):
        self.held = held


def helper(model, tokens):
    model.helper = getattr(model, "helper", None) or Holder(Holder([{"by": 2.0}]))
    return model.helper.held.held[0]["by"]


def call(i: int, **given: Any) -> Callable[[nn.Module], Any]:
    return lambda model: model(CALLS[i % len(CALLS)].clone(), **given)


def change(function: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    return lambda model: function(model) and None


def set_factor(model):
    model.blocks[1].settings["factor"] += 1.0


def a_number_elsewhere(model, tokens):
    return NUMBERS.get(id(model), 2.0)


def set_number_elsewhere(model):
    NUMBERS[id(model)] = 3.0


def enclosed(model, tokens):
    model.by = getattr(model, "by", None) or (lambda settings: lambda: settings["by"])({"by": 2.0})
    return model.by()


def set_enclosed(model):
    model.by.__closure__[0].cell_contents["by"] += 1.0


def write_weight(model):
    model.blocks[0].attn_out.weight.mul_(1.5)


def replace_weight(model):
    model.blocks[0].attn_out.weight = nn.Parameter(model.blocks[0].attn_out.weight * 2, requires_grad=False)


def replace_data(model):
    model.blocks[0].attn_out.bias.data = model.blocks[0].attn_out.bias.data + 1


def set_deep_inside(model):
    model.helper.held.held[0]["by"] = 3.0


def lay_out_otherwise(model):
    model.blocks[0].attn_in.weight.data = model.blocks[0].attn_in.weight.data.t().contiguous().t()


def as_another_class(model):
    model.blocks[0].attn_in.__class__ = Doubled


def own_class(model):
    model.blocks[1].__class__ = type("Own", (model.blocks[1].__class__,), {})


def patch_the_class(model):
    cls = model.blocks[1].__class__
    cls.forward = lambda self, tokens: super(cls, self).forward(tokens) * 2


class Doubled(nn.Linear):
    def forward(self, tokens):
        return super().forward(tokens) * 2


def block_of_its_own(model):
    forward, calls = model.blocks[1].forward, []
    model.blocks[1].forward = lambda tokens: calls.append(1) or (tokens if len(calls) > 5 else forward(tokens))


def hook(model):
    model.blocks[0].attn_in.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_one_rank(model):
    if dist.get_rank() == 1:
        model.blocks[0].attn_in.register_forward_hook(lambda module, args, output: output * 1)


def forward_of_its_own(model):
    layer = model.blocks[0].attn_in
    layer.forward = lambda tokens: F.linear(tokens, layer.weight) * 3


def given_a_weight(model):
    return model(CALLS[0].clone(), other=model.scale)


def given_twice(model):
    tokens = CALLS[1].clone()
    return model(tokens, other=tokens)


def with_gradients(model):
    with torch.enable_grad():
        return model(CALLS[2].clone())


def with_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model(CALLS[2].clone())["sample"].float() * 0


@dataclass(frozen=True)
class Case:
    """Steps that a model goes through, and what becomes of its calls.

    Attributes:
        runs: how often the Python of the captured model runs; None for each time.
        graphs: how many there are in the end.
        told: words of what the report says.
        before: what is done to the model before it is put on the mesh.
    """

    steps: list[Callable[[nn.Module], Any]]
    outside: Callable[[nn.Module, Tensor], Any] = nothing
    runs: int | None = None
    graphs: int = 0
    told: str = "Not captured"
    before: Callable[[nn.Module], Any] = nn.Module.eval


MANY = [call(i) for i in range(7)]
CASES = {
    # One call finds out, one is watched, one captured, one tried.
    "captured": Case(MANY, runs=4, graphs=1, told="operations a call, without the Python around them"),
    "by number": Case(MANY, by_number, runs=4, graphs=1, told="Captured"),
    "chance": Case(MANY, chance, told="gives something else"),  # the seed is set by Python, and not again
    "numbers as arguments": Case([call(i, by=float(1 + i % 2)) for i in range(14)], runs=7, graphs=2, told="Captured"),
    "numbers of every call": Case([call(i, by=float(i)) for i in range(24)], told="is it given a number that changes"),
    "other operands": Case(
        [*[call(i, other=CALLS[3]) for i in range(6)], given_a_weight, given_twice] * 2 + MANY,
        runs=4 + 4 + 2 * 2,
        graphs=2,
        told="Captured",
    ),
    "weights that are written": Case([*MANY, change(write_weight), *MANY], runs=4, graphs=1, told="Captured"),
    "data that is replaced": Case([*MANY, change(replace_data), *MANY], runs=4, graphs=1, told="Captured"),
    "weights that are replaced": Case([*MANY, change(replace_weight), *MANY], runs=7, graphs=1, told="Captured"),
    "settings": Case([*MANY, change(set_factor), *MANY], runs=7, graphs=1, told="Captured"),
    "settings of every call": Case([step for one in MANY * 3 for step in (one, change(set_factor))], told="again and"),
    "gradients in between": Case([*MANY, with_gradients, with_autocast, *MANY], runs=6, graphs=1, told="Captured"),
    "a hook": Case([change(hook), *MANY], told="attn_in has hooks"),
    "a hook from some call on": Case([*MANY, change(hook), *MANY], runs=11, told="attn_in has hooks"),
    "a hook on one rank": Case([change(hook_on_one_rank), *MANY], told="attn_in has hooks"),
    "a forward": Case([change(forward_of_its_own), *MANY], told="attn_in has a forward of its own"),
    "an item": Case(MANY, item, told="item (test_graph_capture.py:"),
    "a choice": Case(MANY, choice, told="depends on values of a tensor"),
    "NaN in places": Case(MANY, nan_in_places, runs=4, graphs=1, told="Captured"),
    "NaN": Case(MANY, lambda model, tokens: float("nan"), told="nothing but NaN and infinities, to which no graph"),
    "a list": Case(MANY, numbers, told="tolist (test_graph_capture.py:"),
    "an array": Case(MANY, array, told="numpy (test_graph_capture.py:"),
    "a tensor of tensors": Case(MANY, tensor_of_tensors, told="tensor (test_graph_capture.py:"),
    "what is true": Case(MANY, what_is_true, told="index (test_graph_capture.py:"),
    "equality": Case(MANY, equality, told="equal (test_graph_capture.py:"),
    "state": Case(MANY, state, told="it changes last"),
    "a weight that it writes": Case(MANY, buffer, told="writes to what it has not made"),
    "an input that it writes": Case(MANY, input_, told="writes to what it has not made"),
    "random numbers": Case(MANY, unseeded, runs=4, graphs=1, told="Captured"),
    "deep inside": Case([*MANY, change(set_deep_inside), *MANY], helper, runs=7, graphs=1, told="Captured"),
    "a number elsewhere": Case(
        [*MANY, change(set_number_elsewhere), *MANY], a_number_elsewhere, runs=7, graphs=1, told="Captured"
    ),
    "what a function encloses": Case([*MANY, change(set_enclosed), *MANY], enclosed, runs=7, graphs=1, told="Captured"),
    "another layout": Case([*MANY, change(lay_out_otherwise), *MANY], runs=7, graphs=1, told="Captured"),
    "another class": Case([*MANY, change(as_another_class), *MANY], runs=7, graphs=1, told="Captured"),
    "a patched class": Case(
        [*MANY, change(patch_the_class), *MANY], runs=7, graphs=1, told="Captured", before=own_class
    ),
    "an iterator": Case(MANY, iterator, told="numbers, a count, of which a change could not be seen"),
    "a generator": Case(MANY, generator, told="generator, a Generator, of which a change could not be seen"),
    "a tensor elsewhere": Case(MANY, elsewhere, told="writes to what it has not made"),
    "a forward of before": Case(MANY, told="blocks.1 has a forward of its own", before=block_of_its_own),
    "a global": Case(MANY, a_global, told="its graph gives something else than the model"),
}


def on_this_rank() -> dict[str, Any]:
    """Of each case and each body of the other tests: the error, and what became of the calls."""
    mesh, found = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"], {}
    with torch.no_grad():
        for name, case in CASES.items():
            alone, model = Model(case.outside), Model(case.outside)
            case.before(alone)
            case.before(model)
            parallel = parallelize(model, mesh, capture=True)
            torch.manual_seed(5)
            expected = [step(alone) for step in case.steps]
            RAN.get().times = 0
            torch.manual_seed(5)
            outputs = [step(model) for step in case.steps]
            error = max(difference(*pair) for pair in zip(outputs, expected, strict=True))
            rest = [[one.get("by") for one in of if isinstance(one, dict)] for of in (outputs, expected)]
            found[name] = error, rest[0] == rest[1], RAN.get().times, len(parallel.graphs), str(parallel.report())
        for of_body in [*BODIES, "", "source", "join", "view"]:
            torch.manual_seed(0)
            model = Joint(of_body) if isinstance(of_body, str) else Tokens(of_body)
            calls = [(hidden, hidden[:, :5] * 2) if isinstance(model, Joint) else (hidden,) for hidden in CALLS * 2]
            alone, errors = copy.deepcopy(model), []
            parallel = parallelize(model, mesh, capture=True)
            for given in calls:
                errors.append(difference(parallel(*map(torch.clone, given)), alone(*map(torch.clone, given))))
            found[str(of_body)] = max(errors), True, 0, len(parallel.graphs), str(parallel.report())
    return found


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    return run_on_ranks(on_this_rank, request.param, tmp_path_factory.mktemp("captured"))


@pytest.mark.parametrize("name", CASES)
def test_a_graph_does_what_the_model_does_or_there_is_none(name, results):
    case = CASES[name]
    error, same, runs, graphs, told = results[name]
    assert error <= 1e-5
    assert same
    assert (graphs, case.told in told) == (case.graphs, True), told
    if case.runs is not None:
        assert runs == case.runs
    else:
        assert runs >= len([step for step in case.steps if step.__qualname__.startswith("call")])


def test_every_body_is_that_of_one_device(results):
    bodies = {name: found for name, found in results.items() if name not in CASES}
    assert {name: found[0] for name, found in bodies.items() if not found[0] <= 1e-5} == {}
    captured = {name for name, found in bodies.items() if found[3]}
    assert captured >= {"", "source", "join", "view"}
