"""Graph passes: each gives the same results of fewer operations, and merges or drops nothing that it must not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from meshdiff.autoshard.capture.passes import (
    BACKEND_PASSES,
    PASSES,
    collapse_views,
    drop_metadata,
    eliminate_common_subexpressions,
    eliminate_dead_code,
    propagate_views,
    run_passes,
    share_views,
)

TOKENS, WEIGHT, ELSEWHERE = torch.randn(2, 7, 12), torch.randn(12, 12), torch.randn(400)
INPUTS = [(TOKENS, WEIGHT), (ELSEWHERE[5:173].view(2, 7, 12), ELSEWHERE[200:344].view(12, 12))]
"""Of one geometry, at two places in their memory."""


def operations(gm: GraphModule) -> Counter[str]:
    """The number of calls of each operation of ATen, by its name, and of others."""
    names = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    return Counter(getattr(name, "_opname", "getitem") for name in names)


def passed(function, *passes, inputs=INPUTS) -> Counter[str]:
    """The operations of a function's graph after these passes; its results are checked to be the function's."""
    gm = run_passes(make_fx(function)(*inputs[0]), inputs[0], passes)
    gm.graph.lint()
    code = gm.code
    gm.recompile()
    assert gm.code == code  # every pass has left the code of its graph
    for given in inputs:
        torch.manual_seed(0)
        expected = function(*given)
        torch.manual_seed(0)
        for found, wanted in zip(gm(*given), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    return operations(gm)


def detours(tokens, weight):
    made = tokens @ weight
    heads = made.unflatten(-1, (3, -1)).transpose(1, 2).transpose(1, 2)
    rows, rest = heads.permute(1, 0, 2, 3).split([2, 5])
    rest[1:, 0].mul_(2)
    made[:, ::2].view(torch.int32)[..., 0] += 1
    made.new_empty(3), rows.sum()
    again = tokens[1:].mT.cos() + tokens[1:].mT.cos()
    views = heads.flatten(2), rows.transpose(0, 1) + heads[:, :2], rest.flatten(2)
    return [tokens[1:].mT, *views, made, weight.t(), again]


@pytest.mark.parametrize("passes", [PASSES, BACKEND_PASSES])
def test_all_passes_give_the_same_results_with_fewer_operations(passes):
    before, after = passed(detours), passed(detours, *passes)
    assert after.total() < before.total() - 5
    assert after["new_empty"] == after["sum"] == 0
    # A backend may lay out memory in another way, and merges what is computed twice itself.
    assert (after["as_strided"], after["cos"]) == ((3, 1) if passes is PASSES else (0, 2))


def test_views_are_noted_of_what_is_computed_and_not_of_inputs():
    def function(tokens, weight):
        made = (tokens @ weight).mul_(2)
        return tokens[1:], made[1:].transpose(0, 1), made.view(torch.int32), made.split([3, 4], 1)[1]

    gm = propagate_views(make_fx(function)(*INPUTS[0]), INPUTS[0])
    views = {node.name: node.meta["meshdiff_view"] for node in gm.graph.nodes if "meshdiff_view" in node.meta}
    roots = {name: view.root.name for name, view in views.items()}
    assert roots.pop("mm") == "mm"  # of weight and tokens, of which the views are not noted
    assert roots.pop("mul_") == roots.pop("transpose") == roots.pop("slice_2") == roots.pop("getitem_1") == "mul_"
    assert roots.pop("getitem") == "mul_"
    assert views["transpose"].geometry == ((7, 1, 12), (12, 84, 1), 84)
    assert views["getitem_1"].geometry == ((2, 4, 12), (84, 12, 1), 36)
    assert not roots.keys() & {"slice_1", "view_2"}


def test_a_view_is_taken_once_and_none_of_all_there_is():
    def function(tokens, weight):
        made = tokens @ weight
        around, one = made.transpose(0, 1).transpose(0, 1), made[:, 1:]
        other = made.split([1, 6], 1)[1]
        return around + 1, one + 1, other + 2, tokens.mT.mT + tokens.mT.mT

    found = passed(function, propagate_views, share_views, eliminate_dead_code)
    # What remains: the four of the input, and one of the two slices.
    assert found["transpose"] == 4
    assert found["slice"] + found["getitem"] == 1


def test_a_conjugate_is_not_taken_for_what_it_is_a_view_of():
    def function(tokens, weight):
        made = torch.complex(tokens, tokens)
        return made + 1, made.conj() + 1, made.conj().imag + 1

    for passes in ([propagate_views, share_views], [propagate_views, collapse_views], PASSES):
        passed(function, *passes)


def test_writes_reach_all_views_that_are_shared():
    def function(tokens, weight):
        made = tokens @ weight
        before = made[:, 1:] + 1
        made.transpose(0, 1).transpose(0, 1)[:, 1:].mul_(2)
        return before, made[:, 1:] + 1, made

    for passes in ([propagate_views, share_views], [propagate_views, collapse_views], PASSES):
        passed(function, *passes)


def test_views_of_views_are_taken_in_one_step():
    def function(tokens, weight):
        made = tokens @ weight
        several = made.split([3, 4], 1)[1] + 1, tokens[1:].mT + 1, made.unsqueeze(0) + 1
        return made[:, 1:].mT.unflatten(1, (3, 4))[0] + 1, *several

    found = passed(function, propagate_views, collapse_views, eliminate_dead_code)
    assert found["as_strided"] == 2
    assert found["slice"] == found["transpose"] == 1  # of an input, which may lie elsewhere
    assert found["unsqueeze"] == 1  # one step as it is
    assert found["split_with_sizes"] == found["getitem"] == found["select"] == 0


def test_dead_code_is_dropped_but_for_writes_and_random_numbers():
    def function(tokens, weight):
        made = tokens @ weight
        made.split([3, 4], 1)[1].sin()
        made[1:].mul_(2)
        torch.rand_like(made)
        return made, torch.rand_like(made)

    found = passed(function, eliminate_dead_code)
    assert found["sin"] == found["split_with_sizes"] == 0
    assert found["mul_"] == 1
    assert found["rand_like"] == 2


def graph_of_collectives() -> GraphModule:
    """Two that are alike, of which one is used, and a weight that is not."""
    graph = Graph()
    tensor = graph.placeholder("tensor")
    graph.get_attr("weight")
    for _ in range(2):
        reduced = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (tensor, "sum", "group"))
        waited = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (reduced,))
    graph.output((waited,))
    module = nn.Module()
    module.weight = nn.Parameter(WEIGHT)
    return GraphModule(module, graph)


@pytest.mark.parametrize("graph_pass", [eliminate_dead_code, eliminate_common_subexpressions])
def test_collectives_stay(graph_pass):
    gm = graph_pass(graph_of_collectives(), [])
    assert operations(gm)["all_reduce"] == 2
    assert len(gm.graph.find_nodes(op="get_attr")) == (graph_pass is not eliminate_dead_code)
    (last,) = next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes
    assert last.name == "wait_tensor_default_1"


COMMON = [eliminate_common_subexpressions, eliminate_dead_code]


def test_what_is_computed_from_the_same_is_computed_once():
    def function(tokens, weight):
        several = [F.silu(tokens[1:].mT).chunk(2, -1)[1] * 2 for _ in range(3)]
        normed = [F.layer_norm(tokens, (12,)).sin() for _ in range(2)]
        return several[0] + several[1] + several[2], normed[0] * normed[1]

    passed(function, eliminate_common_subexpressions)
    expected = {"slice": 1, "transpose": 1, "silu": 1, "split": 1, "native_layer_norm": 1, "getitem": 2, "sin": 1}
    assert passed(function, *COMMON) == Counter(expected | {"mul": 2, "add": 2})


def kept_apart(tokens: Tensor, weight: Tensor) -> dict[str, list[Tensor]]:
    """Pairs that look alike and are not, by the operation of which there are two."""
    numbers, written = tokens.int(), tokens.cos()
    before = written.sin()
    written[1:].transpose(0, 1).mul_(2)
    buffers = [torch.zeros_like(weight), torch.zeros_like(weight)]
    buffers[0].view(-1)[3:].fill_(1)
    named, other = torch.ones_like(tokens), torch.ones_like(tokens)
    part, rest = named[1:], other[1:]
    unwritten = part.exp()
    torch.add(tokens, 1, out=named)
    torch.add(tokens, 1, out=other)
    first = other.tan()
    rest.add_(1)
    return {
        "sub": [(numbers - 1).relu(), (numbers - 1.0).relu()],
        "div": [(tokens / 0.0).relu(), (tokens / -0.0).relu()],
        "sin": [before, written.sin()],
        "zeros_like": [buffer.abs() for buffer in buffers],
        "rand_like": [torch.rand_like(tokens).abs() for _ in range(2)],
        "exp": [unwritten, part.exp()],
        "tan": [first, other.tan()],
    }


@pytest.mark.parametrize("name", list(kept_apart(*INPUTS[0])))
def test_what_only_looks_alike_is_not_merged(name):
    def function(tokens, weight):
        return [one.neg() for one in kept_apart(tokens, weight)[name]]

    assert passed(function, *COMMON)[name] == 2


def test_outputs_of_a_call_stay_two_tensors():
    def function(tokens, weight):
        return tokens + 1, tokens + 1, F.layer_norm(tokens, (12,)).mT, F.layer_norm(tokens, (12,)).mT

    gm = run_passes(make_fx(function)(*INPUTS[0]), INPUTS[0], PASSES)
    outputs = gm(*INPUTS[0])
    assert len({output.untyped_storage().data_ptr() for output in outputs}) == 4


def test_metadata_is_dropped():
    gm = propagate_views(make_fx(detours)(*INPUTS[0]), INPUTS[0])
    assert any(node.meta for node in gm.graph.nodes)
    assert not any(node.meta for node in drop_metadata(gm, INPUTS[0]).graph.nodes)
    gm = make_fx(detours)(*INPUTS[0])
    nodes = list(gm.graph.nodes)
    run_passes(gm, INPUTS[0], PASSES)
    assert not any(node.meta for node in nodes)  # of those that are dropped as well
