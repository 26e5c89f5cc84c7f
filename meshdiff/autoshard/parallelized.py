"""A model that somebody else wrote, over the ranks of a mesh."""

from __future__ import annotations

import functools
import gc
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.fx import GraphModule

from meshdiff.attention.validation import is_checked
from meshdiff.autoshard.aliasing import AliasTracker
from meshdiff.autoshard.block_inputs import become_shards, find_blocks, find_convolutions, shard_tokens
from meshdiff.autoshard.call_key import CallKey, call_key
from meshdiff.autoshard.capture.graph_capture import Backend, GraphCapture
from meshdiff.autoshard.context import ShardingContext
from meshdiff.autoshard.dispatch_mode import SafetyMode, UnsafeMutation
from meshdiff.autoshard.dtensor_utils import map_dtensors, once, out_of_inference, to_plain
from meshdiff.autoshard.fallback import agree_on_fallback, one_line, restore_after, start_again
from meshdiff.autoshard.function_mode import ShardingMode
from meshdiff.autoshard.lazy import LazyReshards
from meshdiff.autoshard.numerics import difference, not_numbers, one_sided, tolerance
from meshdiff.autoshard.op_cache import DispatchCache
from meshdiff.autoshard.patching import Interception, owners
from meshdiff.autoshard.recorder import Recorder
from meshdiff.autoshard.report import Report
from meshdiff.autoshard.snapshot.module_snapshot import ModuleSnapshot
from meshdiff.autoshard.snapshot.policy import Policy
from meshdiff.autoshard.stored_weights import StoredWeights
from meshdiff.distributed.consensus import is_collective_error
from meshdiff.distributed.rank_checks import check_alike, check_inputs, is_due
from meshdiff.distributed.simulation import holds_all_ranks
from meshdiff.distributed.torch_compat import autograd_task, tree_map_only, without_compiling
from meshdiff.distributed.weight_streaming import Storage

__all__ = ["NO_CAPTURE", "Parallelized"]

NO_CAPTURE = "capture=True does not go together with shard_weights or offload: a graph refers to weights where they are"

Forward = Callable[..., Any]

_names = itertools.count()  # of keys in the store, so that ranks have to parallelize in one order


class Parallelized:
    """A model on a mesh; see `meshdiff.parallelize`."""

    def __init__(
        self,
        module: nn.Module,
        mesh: DeviceMesh,
        *,
        blocks: list[str] | None,
        dim: int | None = None,
        strategy: str,
        verify: bool,
        capture: bool | Backend,
        storage: Storage | None = None,
        aside: Callable[[Any, Any], bool] | None = None,
    ) -> None:
        if mesh.ndim != 1:
            raise ValueError(f'parallelize takes a 1-D mesh, mesh["cp"] say; given {mesh.mesh_dim_names}')
        if any(isinstance(owner, Parallelized) for owner in owners(module)):
            raise ValueError(f"{type(module).__name__} or a part of it is on a mesh already; remove() it there first")
        # By name: importing the class takes as long as the rest of torch.
        if any(part._compiled_call_impl or type(part).__name__ == "OptimizedModule" for part in module.modules()):
            raise ValueError(f"{type(module).__name__} is compiled, which hides what it does; parallelize it as it was")
        if blocks is not None:
            missing = sorted(set(blocks) - {name for name, _ in module.named_modules()})
            if missing:
                raise ValueError(f"blocks={missing} are no submodules of {type(module).__name__}")
        if capture and holds_all_ranks():
            raise ValueError("capture=True takes real ranks: in a simulation one graph would have to be every rank's")
        if capture and storage is not None:
            raise ValueError(NO_CAPTURE)
        self.module, self.mesh, self.strategy, self.verify = module, mesh, strategy, verify
        self.dim, self.aside = dim, aside
        find = find_blocks if dim is None else find_convolutions
        self.blocks = find(module) if blocks is None else {name: module.get_submodule(name) for name in blocks}
        self.replicated_kinds: dict[str, str] = {}
        """Kinds of blocks that run on replicated tensors, and why; "" is the full model."""
        self._others: dict[str, set[str]] = {}
        """By kind of block, arguments beside the tokens that are sharded at its entry."""
        self._found: dict[str, set[str]] = {}  # more of them, in the call that goes on
        self._learns = True
        self._name = f"untouched-{next(_names)}"
        self._fallbacks, self._checks = itertools.count(), itertools.count()
        self._settled: set[CallKey] = set()
        self._calls: dict[CallKey, int] = {}
        self._report: Report | None = None
        self._running: _Run | None = None
        # These outlive a call: modules keep tensors, an error leaves some that wait.
        self._op_cache, self._aliases, self._lazy = DispatchCache(), AliasTracker(), LazyReshards()
        self._failed_in: str | None = None  # the block that ended the last call
        self._is_aside = False  # while the untouched model runs
        make = None if isinstance(capture, bool) else capture
        self._captures = GraphCapture(module, mesh, self._name, make) if capture else None
        self._interceptions: list[Interception] = []
        if mesh.size() > 1:
            for name, block in self.blocks.items():
                if block is not module:
                    self._interceptions.append(Interception(block, functools.partial(self._call_block, name), self))
            self._interceptions.append(Interception(module, self._call, self, innermost=True))
        elif self._captures is not None:
            self._interceptions.append(Interception(module, self._call_alone, self, innermost=True))
        self.weights: StoredWeights | None = None
        """The weights that are stored in parts or in host memory; None if all are on every rank's device."""
        if storage is not None:
            self.weights = StoredWeights(module, storage, self.blocks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def report(self) -> Report:
        """The report on the last call with new shapes: what ran on shards or replicated tensors, and what was sent.

        Raises:
            RuntimeError: before the first call.
        """
        if self._report is None:
            raise RuntimeError("there is nothing to report before the first call, or on a mesh of one rank")
        return replace(self._report, captured=self.captured, weights=str(self.weights or ""))

    @property
    def graphs(self) -> list[GraphModule]:
        """Graphs that run on this rank instead of the model, one for each kind of call; `print(graph.code)`."""
        return [] if self._captures is None else [graph.module for graph in self._captures.graphs]

    @property
    def captured(self) -> str:
        """The result of capturing calls, in one line; "" if that was not requested."""
        if self._captures is not None and "" in self.replicated_kinds:
            return "Not captured: it runs replicated on every rank"
        return "" if self._captures is None else str(self._captures)

    @property
    def was_called(self) -> bool:
        """True if there is something to report."""
        return self._report is not None

    def remove(self) -> None:
        """Take the module off the mesh, its weights whole; hooks and forwards that others have put there stay."""
        if self.weights is not None:
            self.weights.remove()
            self.weights = None
        for interception in self._interceptions:
            interception.remove()

    def _call(self, inner: Forward, args: Any, kwargs: Any) -> Any:
        if self.aside is not None and self.aside(args, kwargs):
            return self._untouched(inner, args, kwargs)
        args, kwargs = out_of_inference((args, kwargs))
        key = call_key(self.module, args, kwargs, self.mesh.device_type)
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        is_new = key not in self._settled
        if is_new or is_checked():
            check_alike(self.mesh, self.module, (args, kwargs))
        elif is_due(calls):
            check_inputs(self.mesh, self.module, (args, kwargs), f"{self._name}/{next(self._checks)}")
        if not is_new:
            run = functools.partial(self._call_once, inner, False)
            try:
                captures = None if "" in self.replicated_kinds else self._captures
                return run(args, kwargs) if captures is None else captures.call(run, args, kwargs)
            except UnsafeMutation as error:
                self._settled.discard(key)
                raise UnsafeMutation(f"{error}; the next call will find out anew what can be sharded") from error
        before = ModuleSnapshot(self.module, Policy.RESTORE, (args, kwargs))
        output, learnt = self._find_out(before, inner, args, kwargs)
        if learnt:
            self._settled.clear()  # the next call of any shapes runs in another way
        else:
            self._settled.add(key)
        if self.verify:
            self._compare(before, inner, output, args, kwargs)
        return output

    def _call_alone(self, inner: Forward, args: Any, kwargs: Any) -> Any:
        """On a mesh of one rank."""
        assert self._captures is not None
        return self._captures.call(lambda args, kwargs: inner(*args, **kwargs), args, kwargs)

    def _find_out(self, before: ModuleSnapshot, inner: Forward, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """Run a call that is new: a block that fails on shards is replicated from then on, and the call starts again.

        Returns:
            the output, and True if the next call is to shard more arguments than this one.
        """
        known = dict(self.replicated_kinds)
        while True:
            try:
                self._found = {}
                output = self._call_once(inner, True, args, kwargs)
            except Exception as error:
                kind = self._fallback_kind(error)
                if kind is None:
                    self.replicated_kinds = known  # it is not the mesh that is wrong
                    raise
                if any(self._others.values()):  # it may have been these
                    others, self._others, self._learns = sorted(self._others), {}, False
                    agree_on_fallback(self.mesh, f"{self._name}/{next(self._fallbacks)}", f"{others} replicated", error)
                    restore_after(error, before)
                    continue
                # No name twice: what ranks wrote under an old one would let a rank go on before the others.
                agree_on_fallback(self.mesh, f"{self._name}/{next(self._fallbacks)}", kind, error)
                self.replicated_kinds[kind] = one_line(error)
                restore_after(error, before)
                continue
            learnt = False
            for kind, names in self._found.items():
                learnt = learnt or not names <= self._others.get(kind, set())
                self._others[kind] = self._others.get(kind, set()) | names
            return output, learnt

    def _call_once(self, inner: Forward, new: bool, args: Any, kwargs: Any) -> Any:
        if "" in self.replicated_kinds:
            output = self._untouched(inner, args, kwargs)
            self._report = Report(type(self.module).__name__, self.mesh.size(), (), dict(self.replicated_kinds))
            return output
        with self._on_shards(new) as run:
            if "" in self.blocks:
                args, kwargs = self._entered(run, "", self.module, args, kwargs)
            output = inner(*args, **kwargs)
        with run.recorder or ExitStack():
            output = map_dtensors(once(to_plain), output)
        if run.recorder is not None:
            self._report = Report.of(self.module, self.mesh, run.recorder, self.replicated_kinds)
        return output

    def _untouched(self, inner: Forward, args: Any, kwargs: Any) -> Any:
        """Run the module as if it were on no mesh, on every rank."""
        self._is_aside = True
        try:
            return inner(*args, **kwargs)
        finally:
            self._is_aside = False

    @contextmanager
    def _on_shards(self, record: bool) -> Iterator[_Run]:
        """Turn on the modes that have to be on while the model runs."""
        run = _Run(self._aliases, Recorder(self.mesh) if record else None)
        self._aliases.prune()
        self._lazy.recorder = run.recorder
        collects = gc.isenabled()
        # What is still in use decides whether a write is safe, and ranks must decide alike: only
        # reference counts are the same on all of them.
        gc.disable()
        self._running = run
        try:
            with ExitStack() as stack:
                if torch.is_inference_mode_enabled():  # in which nothing counts writes to tensors
                    stack.enter_context(torch.inference_mode(False))
                    stack.enter_context(torch.no_grad())
                stack.enter_context(without_compiling())
                stack.enter_context(implicit_replication())
                if run.recorder is not None:
                    stack.enter_context(run.recorder)
                guard = SafetyMode(run.aliases, self._lazy, run.on_operation if record else None)
                run.context = ShardingContext(
                    self.mesh,
                    run.aliases,
                    self.strategy,
                    self.dim is not None,
                    guard.off,
                    self._op_cache,
                    self._lazy,
                    run.recorder,
                )
                stack.enter_context(guard)
                stack.enter_context(ShardingMode(run.context))
                yield run
                run.context.materialize_all()
        finally:
            self._running, self._failed_in = None, run.failed_in
            if collects:
                gc.enable()

    def _call_block(self, name: str, inner: Forward, args: Any, kwargs: Any) -> Any:
        if self._is_aside:
            return inner(*args, **kwargs)
        if self._running is None:
            if autograd_task() == -1:  # called by itself: it is a module like any other
                return inner(*args, **kwargs)
            with self._on_shards(False):  # checkpointing does it again for the backward pass
                return self._call_block(name, inner, args, kwargs)
        run, block = self._running, self.blocks[name]
        with run.inside(name, block):
            args, kwargs = self._entered(run, name, block, args, kwargs)
            output = inner(*args, **kwargs)
            if run.recorder is not None and self._learns and self.dim is None:
                found = become_shards(self.mesh, block, args, kwargs, output)
                self._found.setdefault(type(block).__name__, set()).update(found)
            return output

    def _entered(self, run: _Run, name: str, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a block: its tokens on shards, or all tensors plain."""
        if type(block).__name__ in self.replicated_kinds:
            assert run.context is not None
            run.context.materialize_all()

            def gather(tensor: DTensor) -> Tensor:
                plain = to_plain(tensor)
                run.aliases.link(tensor, plain)
                return plain

            return map_dtensors(gather, (args, kwargs))
        others = self._others.get(type(block).__name__, ())
        args, kwargs, became = shard_tokens(self.mesh, block, args, kwargs, others, self.dim)
        for plain, shards in became:
            run.aliases.link(plain, shards)
        return args, kwargs

    def _fallback_kind(self, error: Exception) -> str | None:
        """The kind of block to run on replicated tensors from now on; None if that would not help."""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_collective_error(error):
            return None
        if "" in self.replicated_kinds:
            return None
        name = self._failed_in
        kind = "" if name is None else type(self.blocks[name]).__name__
        return "" if kind in self.replicated_kinds else kind

    def _compare(self, before: ModuleSnapshot, inner: Forward, output: Any, args: Any, kwargs: Any) -> None:
        """With what the untouched model returns when it starts from where the call did."""
        found = tree_map_only(Tensor, torch.clone, output)
        with torch.no_grad(), start_again(before):
            expected = self._untouched(inner, args, kwargs)
        model = type(self.module).__name__
        apart = difference(found, expected)
        if not apart <= tolerance(expected):
            differs = f"differs from the untouched model by {apart:.1e}"
            raise RuntimeError(
                f"verify: {model} on this mesh {one_sided(found, expected, 'the untouched model') or differs}"
            )
        if not_numbers(expected):
            warnings.warn(
                f"verify: the untouched {model} itself returns {not_numbers(expected)}, as it does on this mesh; "
                "only the others could be compared",
                stacklevel=4,
            )


class _Run:
    """One call while it goes on."""

    def __init__(self, aliases: AliasTracker, recorder: Recorder | None) -> None:
        self.aliases, self.recorder = aliases, recorder
        self.context: ShardingContext | None = None
        self.failed_in: str | None = None  # the block that raised, the inner one of several

    @contextmanager
    def inside(self, name: str, block: nn.Module) -> Iterator[None]:
        """While a block runs."""
        outer = None if self.recorder is None else self.recorder.current
        if self.recorder is not None:
            self.recorder.enter(name, type(block).__name__)
        try:
            yield
        except Exception:
            self.failed_in = name if self.failed_in is None else self.failed_in
            raise
        finally:
            if self.recorder is not None and outer is not None:
                self.recorder.current = outer

    def on_operation(self, func: Any, arguments: Any, result: Any) -> None:
        assert self.recorder is not None
        if self.context is None or not self.context.handler_depth:
            self.recorder.on_operation(func, arguments, result)
