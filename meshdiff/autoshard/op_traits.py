"""One table of the traits of operations: of torch functions as a model calls them, and of ATen operations by name.

A torch function has its traits for the mode of functions, which decides by
them what is looked up, deferred or refused. An ATen operation has its for the
mode that sees all operations: a mark that it is known to be right on shards.
Whatever is not in the table has none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Dim", "OpTraits", "traits_of"]


@dataclass(frozen=True)
class Dim:
    """The argument of an operation that gives the dim that it goes along.

    Attributes:
        place: its place among the arguments.
        default: what the dim is if none is given; None for all of them.
    """

    place: int = 1
    default: int | None = None


@dataclass(frozen=True)
class OpTraits:
    """The traits of an operation; the columns of the table.

    Attributes:
        shard_safe: each rank does to its shard what is right for the full tensor, or DTensor gathers, which is noticed.
        safe_unless_dim: the same as long as it does not go along the sharded dim; this names the argument.
        cacheable: what decides the shape, stride, dtype and placement of its result is in its operands, and it writes
            to none of them when it is called as it is here.
        cached_handler: so is what the handler of it makes, which is then cached as well: `F.linear`.
        pointwise: it goes element by element; operands are broadcast.
        rowwise: it does to each row of the sharded dim the same, by weights that every rank has: `F.layer_norm`.
        view: its result may share memory with its first operand.
        reshapes: it is a view whose shape is given.
        by_parts: of rows that are joined it makes what is joined of its results: f(cat(a, b)) is cat(f(a), f(b)), as
            for `torch.mul` of queries of text and image by their rotary table.
        casts: it may be to another dtype.
        unbinds: it takes a dim apart.
        writes_if_asked: an argument may make it write to its operand.
        lazy_aware: its handler reads no rows, so that those that are deferred stay so.
        metadata: it reads metadata of a DTensor.
        storage_access: it uses the memory of a tensor directly, of which a rank holds a part.
        reads_values: the place of the first argument of which it brings values to the host; None if it brings none.
    """

    shard_safe: bool = False
    safe_unless_dim: Dim | None = None
    cacheable: bool = False
    cached_handler: bool = False
    pointwise: bool = False
    rowwise: bool = False
    view: bool = False
    reshapes: bool = False
    by_parts: bool = False
    casts: bool = False
    unbinds: bool = False
    writes_if_asked: bool = False
    lazy_aware: bool = False
    metadata: bool = False
    storage_access: bool = False
    reads_values: int | None = None


NONE = OpTraits()
TRAITS: dict[Any, OpTraits] = {}


def traits_of(operation: Any) -> OpTraits:
    """The traits of a torch function, or of an ATen operation by its name without `aten::`."""
    return TRAITS.get(operation, NONE)


def _have(operations: Iterable[Any], **traits: Any) -> None:
    for operation in operations:
        TRAITS[operation] = replace(traits_of(operation), **traits)


def _functions(*names: str) -> list[Any]:
    """By their names, of the module `torch` and of its class of tensors."""
    return [getattr(where, name) for name in names for where in (torch, Tensor) if hasattr(where, name)]


# Torch functions.

ARITHMETIC = _functions(
    *("add", "sub", "mul", "div", "neg", "abs", "pow", "exp", "sin", "cos", "tanh", "sigmoid", "sqrt", "rsqrt")
)
CASTS = (Tensor.float, Tensor.type_as, Tensor.to)
RESHAPES = (Tensor.unflatten, Tensor.view, *_functions("reshape", "unsqueeze", "flatten", "squeeze"))
REORDERS = (*_functions("permute", "transpose"), Tensor.__getitem__)
UNBINDS = _functions("unbind")
CUTS = (*_functions("chunk"), Tensor.split, torch.split)

_have([*ARITHMETIC, torch.where, F.gelu, *CASTS], cacheable=True, pointwise=True, by_parts=True)
_have([F.linear, F.layer_norm, F.rms_norm, torch.rms_norm], cacheable=True, cached_handler=True, rowwise=True)
_have([F.silu, F.relu], cacheable=True, writes_if_asked=True)
_have([torch.empty_like], cacheable=True)
_have([F.dropout, Tensor.float, Tensor.type_as], cacheable=True, cached_handler=True)
_have(CASTS, casts=True)
_have(RESHAPES, cacheable=True, view=True, reshapes=True, by_parts=True)
_have([*REORDERS, *UNBINDS], cacheable=True, view=True, by_parts=True)
_have(UNBINDS, unbinds=True)
_have(CUTS, cacheable=True, view=True)
_have([torch.stack], by_parts=True)
_have([torch.cat, torch.concat, torch.concatenate, F.scaled_dot_product_attention, Tensor.__getitem__], lazy_aware=True)
_have([*CUTS, *_functions("split_with_sizes", "narrow")], lazy_aware=True)
_have([F.conv1d, F.conv2d, F.conv3d], lazy_aware=True)
_have(
    [getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad")],
    metadata=True,
)
_have([Tensor.size, Tensor.dim, Tensor.numel, *_functions("is_floating_point", "is_complex")], metadata=True)
_have(
    [Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.storage_offset, Tensor.set_],
    storage_access=True,
)
_have([Tensor.__array__, Tensor.numpy], storage_access=True)
_have([Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__array__, Tensor.numpy], reads_values=0)
_have([Tensor.tolist, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__dlpack__], reads_values=0)
_have([Tensor.__repr__, Tensor.__format__, torch.tensor, torch.as_tensor, torch.asarray], reads_values=0)
_have([Tensor.new_tensor, torch.tensor_split, Tensor.tensor_split], reads_values=1)

# ATen operations. All that torch itself calls pointwise are right on shards as well. What is not in the table is not
# known to be right: DTensor has no rule for it, or nobody has tried.
#
# Names in quotes are those of programs in tests/autoshard/test_dtensor_rules.py, the smallest for which DTensor is
# wrong or raises. A test fails once torch has mended a rule: then what the program is the reason for can go.

_have(  # views: what a rank holds of the result is a view of what it holds, or DTensor gathers, which is noticed
    ["view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand",
     "alias", "detach", "movedim", "unflatten"],
    shard_safe=True,
)  # fmt: skip
_have(  # products: a rank's rows, or sums over a sharded dim, which are added up
    ["mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "sum"], shard_safe=True
)
_have(  # along the dims that are not sharded; DTensor gathers where they are
    ["native_layer_norm", "_fused_rms_norm", "rms_norm", "_softmax", "_log_softmax", "cat", "stack"], shard_safe=True
)
_have(  # copies and constants
    ["clone", "_to_copy", "copy_", "fill_", "zero_", "contiguous", "lift_fresh",
     "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"],
    shard_safe=True,
)  # fmt: skip

# "amax of one row", "amin of one row", "amax of a NaN"
_have(["amax", "amin"], safe_unless_dim=Dim())
# "argmax of one row", "argmin of one row", "argmax of a strided shard"
_have(["argmax", "argmin"], safe_unless_dim=Dim())
# "max of one row", "min of one row"
_have(["max", "min"], safe_unless_dim=Dim())
# "number of any"; the product that DTensor makes of `all` has not been tried with NCCL
_have(["any", "all"], safe_unless_dim=Dim())
# "mean in another order", "gradient of var in another order", "gradient of std in another order"
_have(["mean", "var", "std"], safe_unless_dim=Dim())
# "cumsum along a negative dim"
_have(["cumsum"], safe_unless_dim=Dim())
# "vector norm of one row", "sum of a vector norm"
_have(["linalg_vector_norm"], safe_unless_dim=Dim(place=2))
# For these DTensor of torch 2.13 gathers, as is done here. But it leaves a replicated DTensor, of which a linear layer
# may run by another kernel than that of one device (`bmm` for `mm`); here a plain tensor is left.
_have(["sort"], safe_unless_dim=Dim(default=-1))
_have(["topk"], safe_unless_dim=Dim(place=2, default=-1))
# "write to a row"
_have(["select"], safe_unless_dim=Dim())
# "write to a slice", "rows by unbind"
_have(["slice", "unbind"], safe_unless_dim=Dim(default=0))
# "write to a part of a split", "write to a chunk"
_have(["split", "split_with_sizes", "chunk"], safe_unless_dim=Dim(place=2, default=0))
_have(["_pack_padded_sequence"], reads_values=0)
