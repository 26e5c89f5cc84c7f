"""Programs without what leads nowhere: half of the operations of a captured call only look at memory in another way."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from meshdiff.distributed.torch_compat import OpOverload

__all__ = ["tidy"]

View = tuple[torch.Size, tuple[int, ...], int]
"""Shape, stride, and offset in memory."""


def tidy(program: GraphModule, tensors: Sequence[Tensor], at_once: bool = True) -> None:
    """Have every view taken once, and from what was computed; drop what nobody uses.

    How inputs and weights lie decides how what is computed of them does, and a
    program is for those that lie alike. Where they start in their memory may be
    another place each time: views of inputs and weights themselves stay.

    Args:
        program: of operations of `aten` and collectives. It is run once, to see where its views are: it sends what
            it sends, and draws random numbers. And changed.
        tensors: its inputs, to which it does not write.
        at_once: take a view of a view in one step, by where it is in memory; not for who lays out memory anew.
    """
    seen = _Views(program)
    seen.run(*tensors)
    made: dict[tuple[Node, View], Node] = {}
    for node, (root, view) in seen.views.items():
        earlier = made.setdefault((root, view), node)
        if view == seen.roots[root]:
            node.replace_all_uses_with(root)
        elif earlier is not node:
            node.replace_all_uses_with(earlier)
        elif at_once and (node.target is operator.getitem or node.args[0] is not root):
            shape, stride, offset = view
            with program.graph.inserting_before(node):
                direct = program.graph.call_function(
                    torch.ops.aten.as_strided.default, (root, list(shape), list(stride), offset)
                )
            node.replace_all_uses_with(direct)
            made[root, view] = direct
    program.graph.eliminate_dead_code(is_impure_node=_is_needed)
    program.recompile()


class _Views(Interpreter):
    """A run that notes which results are views, and of what.

    Attributes:
        roots: what was computed, and where it lies in its memory.
        views: for each view, what was computed of which it is one, and where it lies.
    """

    def __init__(self, program: GraphModule) -> None:
        super().__init__(program)
        self.roots: dict[Node, View] = {}
        self.views: dict[Node, tuple[Node, View]] = {}
        self._dtypes: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and type(result) is Tensor and _is_strided(result):
            view, source = (result.shape, result.stride(), int(result.storage_offset())), _source(n)
            if source is None:
                self.roots[n], self._dtypes[n] = view, result.dtype
            else:
                root = source if source in self.roots else self.views.get(source, (None,))[0]
                as_it_is = not result.is_conj() and not result.is_neg()
                if root is not None and as_it_is and result.dtype == self._dtypes[root]:
                    self.views[n] = root, view
        return result


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _source(node: Node) -> Node | None:
    """What this is a view of; None if it is computed."""
    if node.target is operator.getitem:
        several = node.args[0]
        assert isinstance(several, Node)
        return _source(several)
    schema = node.target._schema if isinstance(node.target, OpOverload) else None
    if schema is None or not schema.arguments or schema.is_mutable or schema.arguments[0].alias_info is None:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _is_needed(node: Node) -> bool:
    """Whether this does something beside what it returns; other ranks wait for a collective, whoever uses it here."""
    if node.op != "call_function":
        return node.op != "get_attr"
    if node.target is operator.getitem:
        return False
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return True
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags
