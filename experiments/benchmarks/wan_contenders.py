"""Wan's transformer here and that of diffusers with the same weights, for `bench_wan.py` to compare.

Each side is a call without arguments that makes one velocity, and the bytes that it takes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshdiff.diffusion.guidance import classifier_free, divide_branches, run_branches
from meshdiff.distributed.mesh import place, ranks_of_replica, replicate_buffers, replicate_module
from meshdiff.distributed.placements import POSITIONS, REPLICATED, SEQUENCE
from meshdiff.distributed.weight_streaming import Storage, stream
from meshdiff.models.layers import parameter_dtype, rope_3d
from meshdiff.models.wan import WanConfig, WanTransformer, patchify
from meshdiff.models.wan_checkpoint import source_of

WAN = WanConfig()


@dataclass(frozen=True)
class Case:
    """The sizes and inputs of both transformers."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to run on."""
    dim: int | None = None
    """Width of the transformer; 768 or 1536."""
    heads: int | None = None
    """Attention heads; 12."""
    depth: int | None = None
    """Blocks; 4 or 30."""
    ffn_dim: int | None = None
    """Inner width of the feed-forward layers; 4480 or 8960, which is the same ratio to the width."""
    latents: tuple[int, int, int] | None = None
    """Latent frames, rows and columns; 8 32 32 (2,048 tokens) or 21 60 104 (480 x 832 x 81, 32,760 tokens)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights and activations; float32 or bfloat16."""
    text_dim: int = WAN.text_dim
    """Width of encoded text."""
    text: int = 512
    """Tokens of encoded text; Wan pads to 512."""

    @property
    def grid(self) -> tuple[int, int, int]:
        return tuple(size // patch for size, patch in zip(self.latents, WAN.patch, strict=True))

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def shape(self) -> WanConfig:
        return WanConfig(dim=self.dim, heads=self.heads, depth=self.depth, ffn_dim=self.ffn_dim, text_dim=self.text_dim)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made in its body and are alive; scratch inside a kernel is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    # A wrapper around a tensor that is still on its way has a storage of its own, with nothing in it.
    tensors = (t for t in tree_leaves(tree) if isinstance(t, Tensor) and not isinstance(t, AsyncCollectiveTensor))
    return [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]


def added_bytes(run: Callable[[], Any], device: str) -> int:
    """Most bytes that a call holds at once, besides what there was before it."""
    run()  # a first call leaves things behind that later ones use, and DTensor tries out shapes in it
    if device == "cpu":
        with LiveBytes() as memory:
            run()
        return memory.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def randomize(module: nn.Module) -> nn.Module:
    """Draw weights with which every part affects the output; in a new model the gates are almost closed."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if "modulation" in name or "scale_shift_table" in name:
            parameter.normal_(std=0.5)
        elif parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.normal_(1, 0.1)
        else:
            parameter.normal_(std=0.1)
    return module.eval().requires_grad_(False)


def reference(config: Case) -> nn.Module:
    """diffusers' transformer, in the precision in which it loads a checkpoint."""
    from diffusers import WanTransformer3DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="diffusers")
    shape = config.shape
    sizes = {"num_layers": shape.depth, "ffn_dim": shape.ffn_dim, "text_dim": shape.text_dim}
    with torch.device(config.device):
        theirs = WanTransformer3DModel(num_attention_heads=shape.heads, attention_head_dim=shape.head_dim, **sizes)
    for name, parameter in randomize(theirs).named_parameters():
        if not set(theirs._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.to(config.torch_dtype)
    return theirs


def blank(config: Case) -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(config.shape).eval().requires_grad_(False)


def weights_of(theirs: nn.Module, config: Case) -> dict[str, Tensor]:
    """The numbers of diffusers' transformer, as parameters of ours."""
    state = theirs.state_dict()
    sources = {name: source_of(name, "diffusers") for name, _ in blank(config).named_parameters()}
    return {name: torch.cat([s.convert(state[part]) for part in s.names]) for name, s in sources.items()}


def random_weights(config: Case) -> dict[str, Tensor]:
    """Random weights for code that does without diffusers, which takes seconds to import."""
    with torch.device(config.device):
        return dict(randomize(WanTransformer(config.shape)).named_parameters())


def divide_theirs(theirs: nn.Module, config: Case, ranks: int) -> None:
    """diffusers' Ulysses; it lays its mesh over torch's accelerator, of which it finds 0 on a CPU, to divide by."""
    from diffusers import ContextParallelConfig

    with (
        patch.object(torch._C, "_get_accelerator", lambda: torch.device(config.device)),
        patch.object(torch.accelerator, "device_count", lambda: max(1, torch.cuda.device_count())),
    ):
        theirs.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))


def inputs(config: Case, branches: int = 1) -> tuple[Tensor, Tensor]:
    """Latents `[1, channels, frames, rows, columns]` and encoded text `[branches, text, text_dim]`."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, WAN.channels, *config.latents, generator=generator)
    text = torch.randn(branches, config.text, config.text_dim, generator=generator)
    return latents.to(config.device), text.to(config.device)


def their_call(theirs: nn.Module, config: Case) -> Callable[[], Tensor]:
    latents, text = (tensor.to(config.torch_dtype) for tensor in inputs(config))
    now = torch.full((1,), 500.0, device=config.device)
    return lambda: theirs(latents, now, text, return_dict=False)[0]


class Ours:
    """Our transformer on a mesh, with what a run gives it; `stored` are the bytes of its weights on this rank."""

    def __init__(
        self, config: Case, weights: dict[str, Tensor], mesh: DeviceMesh, branches: int = 1, divided: bool = False
    ) -> None:
        cp, (latents, text) = mesh["cp"], inputs(config, branches)
        self.mesh, self.branches, self.transformer = mesh, branches, blank(config)
        with LiveBytes() as memory:
            self._put_weights(weights, config.torch_dtype, divided)
        self.stored = memory.live
        self.x = patchify(latents, WAN.patch)
        self.tokens, self.text = place(self.x, cp, [SEQUENCE]), place(text, cp, [REPLICATED])
        self.now = place(torch.full((1,), 500.0, device=config.device), cp, [REPLICATED])
        rope = rope_3d(config.grid, config.shape.head_dim)
        self.rope = tuple(place(table.to(config.device), cp, [POSITIONS]) for table in rope)
        self.context = self.transformer.encode_text(self.text)

    def _put_weights(self, weights: dict[str, Tensor], dtype: torch.dtype, divided: bool) -> None:
        """Put the weights on the mesh as a pipeline does."""
        transformer, cp = self.transformer, self.mesh["cp"]

        def load(names: list[str]) -> None:
            for name in names:
                owner, _, attribute = name.rpartition(".")
                value = weights[name].to(parameter_dtype(name, dtype), copy=True)
                setattr(transformer.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))

        if divided:
            storage = Storage(torch.device(self.mesh.device_type), cp, ranks_of_replica(self.mesh))
            stream(transformer, transformer.order, load, storage)
            replicate_buffers(transformer, cp)
        else:
            load(list(weights))
            replicate_module(transformer, cp)

    def velocity(self) -> Tensor:
        return self.transformer(self.tokens, self.now, self.context, self.rope)

    def velocity_with_text(self) -> Tensor:
        return self.transformer(self.tokens, self.now, self.transformer.encode_text(self.text), self.rope)

    def guided(self) -> Callable[[], Tensor]:
        """All branches of a step and what guidance makes of them."""
        x, context = place(self.x, self.mesh, [REPLICATED, SEQUENCE]), divide_branches(self.context, self.mesh)
        guide = classifier_free(5.0)

        def denoise(tokens: Tensor, context: Tensor) -> Tensor:
            return self.transformer(tokens, self.now, context, self.rope)

        return lambda: guide(run_branches(denoise, x, context, self.branches))


def compile_blocks(ours: Ours) -> None:
    """Compile the blocks as a pipeline does."""
    for block in ours.transformer.blocks:
        block.compile(fullgraph=True, dynamic=False)
