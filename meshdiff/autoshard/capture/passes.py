"""Graph passes: common subexpressions, view collapsing, dead code.

Half of the operations of a captured call only address memory in another way.
A pass is a function `(gm, example_inputs) -> gm`, which changes the graph module
that it is given and returns it. A captured graph is not functional: it has
writes in place and collectives, and every pass has to be right for those.

A graph is for inputs and weights that lie in memory alike, so how they lie
decides how results do. Where they start in their memory may be another place
each time: views of inputs and weights themselves are never replaced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from meshdiff.distributed.torch_compat import OpOverload, tree_leaves

__all__ = [
    "BACKEND_PASSES",
    "PASSES",
    "Pass",
    "collapse_views",
    "drop_metadata",
    "eliminate_common_subexpressions",
    "eliminate_dead_code",
    "propagate_views",
    "run_passes",
    "share_views",
]

Pass = Callable[[GraphModule, Sequence[Tensor]], GraphModule]
"""Takes a graph of operations of `aten` and collectives, and its inputs, to which it does not write."""

VIEW = "meshdiff_view"
"""The key of `Node.meta` under which `propagate_views` leaves a `View`."""

Geometry = tuple[torch.Size, tuple[int, ...], int]
"""Shape, stride, and offset in memory."""


@dataclass(frozen=True)
class View:
    """A strided tensor: the computed result whose memory it has, and where it lies there.

    Attributes:
        root: of a result that is computed, itself.
        geometry: of this tensor.
        dtype: of the root, and of all its views that are noted.
    """

    root: Node
    geometry: Geometry
    dtype: torch.dtype


def run_passes(gm: GraphModule, example_inputs: Sequence[Tensor], passes: Sequence[Pass]) -> GraphModule:
    """Apply one pass after the other."""
    for graph_pass in passes:
        gm = graph_pass(gm, example_inputs)
    return gm


def eliminate_common_subexpressions(gm: GraphModule, example_inputs: Sequence[Tensor]) -> GraphModule:
    """Compute once what is computed several times from the same operands.

    Not merged are collectives, random numbers, writes, whatever reads or makes memory that is written to, and results
    whose memory leaves the graph: two outputs of a call stay two tensors.

    `torch.fx.passes.dialect.common.cse_pass.CSEPass` is not used: it is for functional graphs, and takes 1, 1.0 and
    True, or 0.0 and -0.0, for the same argument.
    """
    written, returned = _written_memory(gm), _returned_memory(gm)
    computed: dict[tuple[Any, str, str], Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or _has_side_effect(node) or node in returned:
            continue
        if any(_memory(used) in written for used in (node, *node.all_input_nodes)):
            continue
        # Names of nodes are unique; the text of a number tells its type and sign.
        earlier = computed.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
    return _recompiled(gm)


def propagate_views(gm: GraphModule, example_inputs: Sequence[Tensor]) -> GraphModule:
    """Note of each result the memory that it has, for `share_views` and `collapse_views`.

    It runs the graph once: what a call sends is sent, and random numbers are drawn.
    """
    _ViewPropagation(gm).run(*example_inputs)
    return gm


def share_views(gm: GraphModule, example_inputs: Sequence[Tensor]) -> GraphModule:
    """Take each view of a result once, and none that is the result as it lies. After `propagate_views`."""
    taken: dict[tuple[Node, Geometry], Node] = {}
    for node, view in _views(gm):
        first = taken.setdefault((view.root, view.geometry), node)
        if view.geometry == view.root.meta[VIEW].geometry:
            node.replace_all_uses_with(view.root)
        elif first is not node:
            node.replace_all_uses_with(first)
    return _recompiled(gm)


def collapse_views(gm: GraphModule, example_inputs: Sequence[Tensor]) -> GraphModule:
    """Take a view of a view in one step, by where it lies in memory. After `propagate_views`.

    Not for a backend that lays out memory anew, for which strides of before are wrong.
    """
    for node, view in _views(gm):
        if node.users and node.args[0] is not view.root:  # of several results, it is the node that made them
            shape, stride, offset = view.geometry
            with gm.graph.inserting_before(node):
                direct = gm.graph.call_function(
                    torch.ops.aten.as_strided.default, (view.root, list(shape), list(stride), offset)
                )
            direct.meta[VIEW] = view
            node.replace_all_uses_with(direct)
    return _recompiled(gm)


def eliminate_dead_code(gm: GraphModule, example_inputs: Sequence[Tensor]) -> GraphModule:
    """Drop results without a use, unless computing them has an effect, as collectives and writes have."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr" and _has_side_effect(node))
    return _recompiled(gm)


def drop_metadata(gm: GraphModule, example_inputs: Sequence[Tensor]) -> GraphModule:
    """Drop `Node.meta`: of each result a tensor without values, which take more memory than all the rest of a graph."""
    for node in gm.graph.nodes:
        node.meta.clear()
    return gm


PASSES: tuple[Pass, ...] = (
    propagate_views,
    share_views,
    eliminate_common_subexpressions,
    collapse_views,
    drop_metadata,
    eliminate_dead_code,
)
"""For a graph that is run as it is. Metadata goes before dead code: a graph keeps its erased nodes in memory."""

BACKEND_PASSES: tuple[Pass, ...] = (propagate_views, share_views, eliminate_dead_code)
"""For a graph that is given to a backend, which lays out memory and finds common subexpressions itself."""


class _ViewPropagation(Interpreter):
    """A run of a graph that notes a `View` of each result that is strided, and no view of an input or a weight."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and type(result) is Tensor and _is_strided(result):
            geometry, source = (result.shape, result.stride(), int(result.storage_offset())), _viewed(n)
            if source is None:
                n.meta[VIEW] = View(n, geometry, result.dtype)
            elif (view := source.meta.get(VIEW)) is not None and _has_bits_of(result, view.dtype):
                n.meta[VIEW] = View(view.root, geometry, view.dtype)
        return result


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _has_bits_of(tensor: Tensor, dtype: torch.dtype) -> bool:
    """True if a view reads the memory of a tensor of this dtype as that does."""
    return tensor.dtype == dtype and not tensor.is_conj() and not tensor.is_neg()


def _views(gm: GraphModule) -> Iterator[tuple[Node, View]]:
    """Results that are views of others, in the order of the graph, which may be changed meanwhile."""
    for node in list(gm.graph.nodes):
        view = node.meta.get(VIEW)
        if view is not None and view.root is not node:
            yield node, view


def _maker(node: Node) -> Node:
    """The node that computes a result: of one of several results, the one that makes them all."""
    if node.target is not operator.getitem:
        return node
    several = node.args[0]
    assert isinstance(several, Node)
    return several


def _schema(node: Node) -> Any:
    return node.target._schema if isinstance(node.target, OpOverload) else None


def _shared(node: Node) -> Node | None:
    """The operand whose memory the result has, as a view or because it was written to; None if there is none."""
    maker = _maker(node)
    schema = _schema(maker)
    if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
        return None
    return maker.args[0] if isinstance(maker.args[0], Node) else None  # else a list, of which nothing is returned


def _viewed(node: Node) -> Node | None:
    """The operand that this is a view of; None if it is computed, or was written to."""
    schema = _schema(_maker(node))
    return None if schema is not None and schema.is_mutable else _shared(node)


def _memory(node: Node) -> Node:
    """The node that made the memory of a result."""
    while (shared := _shared(node)) is not None:
        node = shared
    return _maker(node)


def _written_memory(gm: GraphModule) -> set[Node]:
    """All memory, by the node that made it, to which some node writes."""
    written: set[Node] = set()
    for node in gm.graph.nodes:
        schema = _schema(node)
        if schema is not None and schema.is_mutable:
            written.add(node)  # what it returns may be an argument that it was given by name
            for place, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
                    written.update(_memory(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Node))
    return written


def _returned_memory(gm: GraphModule) -> set[Node]:
    return {_memory(leaf) for node in gm.graph.find_nodes(op="output") for leaf in node.all_input_nodes}


def _has_side_effect(node: Node) -> bool:
    """True if a node does something beside what it returns, or may return something else the next time."""
    if node.op != "call_function":
        return True
    if node.target is operator.getitem:
        return False
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return True
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _recompiled(gm: GraphModule) -> GraphModule:
    gm.recompile()
    return gm
