"""Mesh attention for code that was not written for it: `F.scaled_dot_product_attention` becomes it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from meshdiff.attention.mesh_attention import mesh_attention
from meshdiff.attention.problem import chunk_sizes
from meshdiff.attention.strategy import AUTO
from meshdiff.distributed.local_shards import to_shard
from meshdiff.distributed.placements import SEQUENCE
from meshdiff.distributed.simulation import largest, on_each_rank
from meshdiff.distributed.torch_compat import OPAQUE_ATTENTION

__all__ = ["sharded_attention"]

SEQUENCE_TO_SEQUENCE, TO_WHOLE, UNKNOWN = range(3)

# Attention that torch computes inside, where no one sees it: of the shard alone, and so wrongly.
_OPAQUE = (
    F.multi_head_attention_forward,
    *OPAQUE_ATTENTION,
)


class sharded_attention(TorchFunctionMode):  # used as a context manager, as torch names them
    """Inside, `F.scaled_dot_product_attention` attends over a mesh.

    DTensors `[batch, heads, seq, head_dim]` are attended to by their placements,
    as `mesh_attention` does: query `Shard(2)`, key and value `Shard(2)` or
    `Replicate()`.

    Plain tensors are taken for the shards of a sequence if `mesh` and `seq_len`
    declare one: rank r holds part r of `torch.chunk(whole, N, dim=seq)`, uneven
    parts included. The lengths of tensors decide which calls attend to the sequence.

    Args:
        mesh: the 1-D mesh that plain tensors are shards over; None to leave plain tensors alone.
        seq_len: the length of the full sequence of plain shards.
        whole: lengths of other sequences, such as a text's, that are replicated;
            attention to them sends nothing.
        strategy: see `mesh_attention`.

    What is recomputed for the backward pass (`torch.utils.checkpoint`) is
    recomputed outside: give it
    `context_fn=lambda: (nullcontext(), sharded_attention(...))` and
    `use_reentrant=False`.

    Raises:
        ValueError: on entering, if a length of `whole` could be taken for a
            shard's; inside, for a call whose lengths are neither, for dropout, and
            for `nn.MultiheadAttention`, whose attention cannot be seen from outside.

    Example:
        >>> with sharded_attention(mesh["cp"], seq_len=4096, whole=[77]):
        ...     out = model(x.chunk(N, dim=1)[rank], text)  # a model that knows nothing of meshes
    """

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        seq_len: int | None = None,
        whole: Collection[int] = (),
        strategy: str = AUTO,
    ) -> None:
        super().__init__()
        if (mesh is None) != (seq_len is None):
            raise ValueError("sharded_attention takes mesh and seq_len together: plain tensors do not tell either")
        if mesh is not None and mesh.ndim != 1:
            raise ValueError(f'sharded_attention takes a 1-D mesh, mesh["cp"] say; given {mesh.mesh_dim_names}')
        self.mesh, self.seq_len, self.whole, self.strategy = mesh, seq_len, tuple(whole), strategy
        self.shard_sizes = tuple(chunk_sizes(seq_len, mesh.size())) if mesh is not None and seq_len is not None else ()
        alike = [length for length in self.whole if mesh is not None and mesh.size() > 1 and length in self.shard_sizes]
        if alike:
            raise ValueError(
                f"a whole sequence of {alike[0]} tokens could be taken for a shard of {seq_len} tokens over "
                f"{len(self.shard_sizes)} ranks; pad it by a token (and mask that), or pass DTensors instead"
            )

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in _OPAQUE and (self.mesh is not None or any(isinstance(arg, DTensor) for arg in args)):
            raise ValueError(
                f"{func.__name__} (of nn.MultiheadAttention) attends where sharded_attention cannot see it; "
                "call F.scaled_dot_product_attention instead"
            )
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
        sharded = any(isinstance(tensor, DTensor) for tensor in (query, key, value))
        if not sharded:
            kind = self._kind(query, key)
            if kind != SEQUENCE_TO_SEQUENCE:
                if kind == TO_WHOLE and is_causal and query.shape[2] != key.shape[2]:
                    raise ValueError("is_causal from a shard to a whole sequence: pass DTensors, which know the order")
                return F.scaled_dot_product_attention(
                    query, key, value, dropout_p=dropout_p, enable_gqa=enable_gqa, **options
                )
        if dropout_p:
            raise ValueError(f"dropout_p={dropout_p} given; attention over a mesh has none, put the model in eval()")
        if query.ndim != 4:
            raise ValueError(f"attention over a mesh takes [batch, heads, seq, head_dim]; given {list(query.shape)}")
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise ValueError(f"{query.shape[1]} heads of query and {key.shape[1]} of key need enable_gqa=True")
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if sharded:
            return mesh_attention(query, key, value, strategy=self.strategy, **options).transpose(1, 2)
        query, key, value = (self._from_shard(tensor) for tensor in (query, key, value))
        return to_shard(mesh_attention(query, key, value, strategy=self.strategy, **options)).transpose(1, 2)

    def _kind(self, query: Tensor, key: Tensor) -> int:
        """The kind of attention that plain tensors need, found from their lengths on every rank."""
        if self.mesh is None or self.mesh.size() == 1:
            return TO_WHOLE
        kind = largest(_kind(query, key, self.shard_sizes, self.whole, self.mesh.get_local_rank()))
        if kind == UNKNOWN:
            raise ValueError(
                f"attention of {query.shape[-2]} to {key.shape[-2]} tokens: neither a shard of seq_len={self.seq_len} "
                f"over {self.mesh.size()} ranks ({list(self.shard_sizes)}) nor declared whole={list(self.whole)}"
            )
        return kind

    def _from_shard(self, tensor: Tensor) -> DTensor:
        assert self.mesh is not None
        assert self.seq_len is not None
        batch, _, heads, head_dim = tensor.shape
        whole = torch.empty(batch, self.seq_len, heads, head_dim, device="meta")
        return DTensor.from_local(
            tensor, self.mesh, [SEQUENCE], run_check=False, shape=whole.shape, stride=whole.stride()
        )


@on_each_rank
def _kind(query: Tensor, key: Tensor, shard_sizes: tuple[int, ...], whole: tuple[int, ...], rank: int) -> int:
    own, queries, keys = shard_sizes[rank], query.shape[-2], key.shape[-2]
    if queries == own and keys == own:
        return SEQUENCE_TO_SEQUENCE
    return TO_WHOLE if keys in whole and (queries == own or queries in whole) else UNKNOWN
