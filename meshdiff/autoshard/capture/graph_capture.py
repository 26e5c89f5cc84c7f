"""Calls that have settled, as graphs: what a rank computes and sends, without the Python that led there.

The Python of a model, and what stands around each torch function to keep it on
shards, take as long in every call and come to the same operations. A graph is
these operations, on the plain tensors of one rank, collectives included, as
torch's `make_fx` notes them while the model runs: an `fx` graph, to be run, read
or compiled. Weights are in it by which tensors they are, not by value.

Whatever else a model's Python does is not done again. So a call is watched once
(`purity`): it has no graph if it reads values of tensors, writes to what it has
not made, changes the model, or calls hooks. It is captured the next time, and
the graph is tried in the call after that, beside the model. From then on it
runs for calls like that one (`call_key`), as long as the model is what it was
(`snapshot`, by its policy `GUARD`). All else runs without. To capture and to try
takes three calls more, once: what these compute and send is thrown away. The
graphs of the kinds of calls that were used last are kept (`call_kinds`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from meshdiff.autoshard.call_key import CallKey, call_key
from meshdiff.autoshard.capture.call_kinds import KINDS, CallKinds, NotCaptured
from meshdiff.autoshard.capture.passes import BACKEND_PASSES, PASSES, run_passes
from meshdiff.autoshard.capture.purity import note_output, watching
from meshdiff.autoshard.fallback import agree_on_fallback, one_line, restore_after
from meshdiff.autoshard.numerics import difference, has_numbers, one_sided, tolerance
from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot
from meshdiff.autoshard.snapshot.policy import Policy
from meshdiff.distributed.consensus import all_gather_object, is_collective_error
from meshdiff.distributed.torch_compat import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

__all__ = ["Backend", "GraphCapture"]

CHANGES = 3
"""Number of changes of a model between calls of a kind after which they are no longer captured."""

Run = Callable[[Any, Any], Any]
Backend = Callable[[GraphModule], Callable[..., Any]]


@dataclass(frozen=True)
class CapturedGraph:
    """The operations and collectives of one rank in calls of one kind.

    Attributes:
        module: the `fx` graph; takes the tensors of a call, returns those of its output.
        run: what the backend made of it; the module itself without a backend.
        structure, leaves: of the model's output; in the place of each tensor, `Tensor`.
        note: why the module itself is run, if a backend has made something else of it.
    """

    module: GraphModule
    run: Callable[..., Any]
    structure: TreeSpec
    leaves: tuple[Any, ...]
    note: str = ""

    def __call__(self, tensors: list[Tensor]) -> Any:
        made = iter(self.run(*tensors))
        return tree_unflatten([next(made) if leaf is Tensor else leaf for leaf in self.leaves], self.structure)

    @property
    def size(self) -> int:
        """Number of operations."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


@dataclass
class CaptureState:
    """Calls that are alike, and how far they have come."""

    was_watched: bool = False
    graph: CapturedGraph | None = None
    was_tried: bool = False
    changes: int = 0
    runs: int = 0
    """Number of times its graph has run instead of the model."""
    rejection: str = ""
    """The reason why there will be no graph; "" if there may be one."""


class GraphCapture:
    """The graphs of one model on one mesh.

    Args:
        module: the model.
        mesh: the 1-D mesh that it is on.
        name: of this model, the same on every rank, and no other's.
        backend: makes of a graph what is run, `torch.compile` say; None to run the graph itself.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh, name: str, backend: Backend | None) -> None:
        self.module, self.mesh, self.name, self.backend = module, mesh, name, backend
        self._kinds = CallKinds(CaptureState)
        self._rejection = ""  # of the last call without a graph
        self._fallbacks = 0
        self._guard: ModuleSnapshot | None = None  # of the model that was captured

    @property
    def graphs(self) -> list[CapturedGraph]:
        """The graphs that run instead of the model."""
        return [kind.graph for kind in self._kinds if kind.graph is not None and kind.was_tried]

    def __str__(self) -> str:
        if self.graphs:
            sizes = sorted({graph.size for graph in self.graphs})
            size = " and ".join(f"{size:,}" for size in sizes) if len(sizes) < 4 else f"{sizes[0]:,} to {sizes[-1]:,}"
            number = f" in {len(self.graphs)} graphs" if len(self.graphs) > 1 else ""
            notes = sorted({graph.note for graph in self.graphs if graph.note})
            if self._kinds.let_go:
                notes.append(
                    f"of {self._kinds.let_go:,} kinds of calls the graphs were let go, for {KINDS} are kept, those "
                    f"used last; let go last: for inputs of {self._kinds.last or 'no shape'}"
                )
            return "; ".join([f"Captured: {size} operations a call{number}, without the Python around them", *notes])
        return f"Not captured: {self._rejection or 'it has not been called often enough'}"

    def call(self, run: Run, args: Any, kwargs: Any) -> Any:
        """The output of the model, by its graph if there is one, else by `run`, which calls the model on the mesh."""
        key = call_key(self.module, args, kwargs, self.mesh.device_type, exact=True)
        try:
            kind = self._kind(key)
        except NotCaptured as reason:
            self._rejection = str(reason)
            kind = None
        if kind is None:
            return run(args, kwargs)
        what = self._changed() if kind.was_watched else ""
        if what:
            self._agree(f"{type(self.module).__name__} was changed: {what}")
            self._kinds.replace(lambda one: one if one.graph is None else CaptureState(changes=one.changes + 1))
            kind = self._kinds.use(key)
        if not kind.was_watched:
            return self._watch(kind, run, args, kwargs)
        tensors = list({id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}.values())
        if kind.graph is None:
            return self._capture(kind, run, args, kwargs, tensors)
        if not kind.was_tried:
            return self._try(kind, kind.graph, run, args, kwargs, tensors)
        kind.runs += 1
        return kind.graph(tensors)

    def _kind(self, key: CallKey) -> CaptureState:
        settings = key.grad_state
        if settings.grad or settings.inference or any(dtype is not None for _, dtype in settings.autocast):
            raise NotCaptured("only calls under torch.no_grad() and without autocast are captured")
        if key.opaque:
            raise NotCaptured(f"it is given {key.opaque}")
        kind = self._kinds.use(key)
        if kind.rejection:
            raise NotCaptured(kind.rejection)
        return kind

    def _changed(self) -> str:
        """The name of something of the model that is another one than in the graphs; "" if nothing is."""
        if self._guard is None:
            return ""
        before, self._guard = self._guard, self._guard.retake()
        return before.diff(self._guard)

    def _watch(self, kind: CaptureState, run: Run, args: Any, kwargs: Any) -> Any:
        """A call as it always is, in which we see whether it does something that a graph would miss."""
        self._agree("a call is new on this rank: of other shapes, strides or arguments, or of a model that was changed")
        with watching(self.module, (args, kwargs)) as watch:
            output = run(args, kwargs)
        note_output(watch, output)
        if kind.changes >= CHANGES:
            watch.note("the model is changed again and again")
        kind.was_watched = True
        self._agree_on_rejection(kind, watch.found)
        return output

    def _capture(self, kind: CaptureState, run: Run, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """A call whose operations are noted."""
        leaves, structure = tree_flatten((args, kwargs))
        outputs: list[Any] = []

        def traced(*own: Tensor) -> list[Tensor]:
            given = {id(tensor): alias for tensor, alias in zip(tensors, own, strict=True)}
            args, kwargs = tree_unflatten([given.get(id(leaf), leaf) for leaf in leaves], structure)
            outputs.append(run(args, kwargs))
            return [leaf for leaf in tree_leaves(outputs[0]) if isinstance(leaf, Tensor)]

        before = ModuleSnapshot(self.module, Policy.RESTORE, (args, kwargs))
        try:
            with watching(self.module, (args, kwargs)) as watch:
                # AliasTracker, or a weight that is given as well would be an input where it is a weight.
                module = make_fx(traced)(*(tensor.detach() for tensor in tensors))
        except Exception as error:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_collective_error(error):
                raise
            restore_after(error, before)
            kind.rejection = self._rejection = one_line(error)
            self._agree(kind.rejection)
            return run(args, kwargs)
        note_output(watch, outputs[0])
        if not self._agree_on_rejection(kind, watch.found):
            with self._same_numbers():
                module = run_passes(module, tensors, PASSES if self.backend is None else BACKEND_PASSES)
            flat, returned = tree_flatten(outputs[0])
            kind.graph = CapturedGraph(
                module,
                module if self.backend is None else self.backend(module),
                returned,
                tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in flat),
            )
            self._guard = self._guard or ModuleSnapshot(self.module, Policy.GUARD)
        return outputs[0]

    def _try(
        self, kind: CaptureState, graph: CapturedGraph, run: Run, args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> Any:
        """A call by the model and by its graph, with other inputs than those that it was captured with."""
        with self._same_numbers():
            expected = run(args, kwargs)
        reason = _otherwise(graph, tensors, expected)
        if graph.run is not graph.module:
            reasons = [of_rank for of_rank in all_gather_object(reason, self.mesh) if of_rank]
            if reasons:
                kind.graph = replace(graph, run=graph.module, note=f"uncompiled, as the compiled graph {reasons[0]}")
                reason = _otherwise(kind.graph, tensors, expected)
        kind.was_tried = all(all_gather_object(has_numbers(expected), self.mesh))
        if not kind.was_tried:
            self._rejection = "the model returns nothing but NaN and infinities, to which no graph can be compared"
        self._agree_on_rejection(kind, f"its graph {reason}" if reason else "")
        return expected

    def _same_numbers(self) -> AbstractContextManager[None]:
        """The random numbers that are drawn in the body are those that are drawn after it."""
        on_cpu = self.mesh.device_type == "cpu"
        return torch.random.fork_rng([] if on_cpu else [torch.accelerator.current_device_index()])

    def _agree(self, why: str) -> None:
        """Wait until every rank leaves the way for this reason; one alone would wait for others in the next collective.

        Raises:
            RuntimeError: that names the reason, if they do not.
        """
        self._fallbacks += 1
        agree_on_fallback(self.mesh, f"{self.name}/capture/{self._fallbacks}", why, RuntimeError(why))

    def _agree_on_rejection(self, kind: CaptureState, reason: str) -> bool:
        """True if a rank has a reason against a graph of these calls, the first of which is kept; a collective."""
        reasons = [of_rank for of_rank in all_gather_object(reason, self.mesh) if of_rank]
        if reasons:
            kind.rejection = self._rejection = reasons[0]
            kind.graph = None
        return bool(reasons)


def _otherwise(graph: CapturedGraph, tensors: list[Tensor], expected: Any) -> str:
    """The difference between a graph and the model, in words; "" if there is none."""
    try:
        output = graph(tensors)
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_collective_error(error):
            raise
        return f"cannot run: {one_line(error)}"
    (own, structure), (leaves, wanted) = tree_flatten(output), tree_flatten(expected)
    if structure != wanted or not all(map(_same_kind, own, leaves)):
        return "gives something of another form than the model"
    apart = difference(output, expected)
    if apart <= tolerance(expected):
        return ""
    return one_sided(output, expected, "the model") or f"gives something else than the model ({apart:.1e} apart)"


def _same_kind(leaf: Any, expected: Any) -> bool:
    """True if two leaves are equal, except for the values of floating point tensors."""
    if not isinstance(leaf, Tensor) or not isinstance(expected, Tensor):
        return type(leaf) is type(expected) and leaf == expected
    alike = leaf.shape == expected.shape and leaf.dtype == expected.dtype
    return alike and (leaf.is_floating_point() or leaf.is_complex() or torch.equal(leaf, expected))
