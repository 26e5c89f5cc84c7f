"""One text-to-video run on a (cfg, cp) mesh, from request to frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.attention import MeshAttention
from meshdiff.attention.hybrid import members
from meshdiff.attention.problem import chunk_sizes
from meshdiff.attention.strategy import AUTO
from meshdiff.diffusion.guidance import Combine, classifier_free, divide_branches, run_branches
from meshdiff.diffusion.request import Request
from meshdiff.diffusion.sampling import sample
from meshdiff.distributed.mesh import DP, Layout, place, ranks_of_replica, replica, replicate_buffers, replicate_module
from meshdiff.distributed.placements import POSITIONS, REPLICATED, SEQUENCE
from meshdiff.distributed.simulation import on_each_rank, unwrap
from meshdiff.distributed.weight_streaming import Storage, Streamed, stream
from meshdiff.errors import InputError
from meshdiff.models import VideoModel

__all__ = ["Pipeline", "check_strategy", "prepare_request"]


def prepare_request(model: VideoModel, request: Request, layout: Layout) -> Request:
    """The request with nothing left open; raises `InputError` if the model or the layout cannot do it."""
    request = model.prepare(request)
    tokens = math.prod(model.grid(request))
    if tokens < 2:  # a sequence of one is no sequence to DTensor
        raise InputError("--height", f"{request.height} x {request.width} is a single token; make the clip larger")
    if 0 in chunk_sizes(tokens, layout.cp):
        most = max(n for n in range(1, layout.cp) if 0 not in chunk_sizes(tokens, n))
        raise InputError(
            "--cp", f"{layout.cp} ranks leave some without any of this clip's {tokens} tokens; use --cp {most} or fewer"
        )
    return request


def check_strategy(model: VideoModel, layout: Layout, strategy: str) -> None:
    """Raise `InputError` if that strategy cannot divide the model's heads on this layout."""
    for transformer in model.transformers:
        heads = transformer.config.heads
        if strategy == "hybrid" and layout.cp > 1 and not 1 < members(heads, heads, layout.cp) < layout.cp:
            raise InputError(
                "--strategy hybrid",
                f"needs heads that some of the --cp ranks divide, and not all; {heads} heads are on {layout.cp} ranks",
            )


class Pipeline:
    """A model on a mesh.

    Args:
        model: its transformers' weights become DTensors on `mesh["cp"]`, in place.
        mesh: from `init_mesh`; of one with replicas, this rank's takes part.
        dtype: of weights and activations; the sampler's state stays float32.
        compile: compile each block with `torch.compile`.
        shard_weights: each weight is sharded between all ranks of the mesh, and
            the weights of a block are gathered at a time. Otherwise every rank
            stores all weights: `cp` divides activations only.
        offload: weights are kept in host memory and copied to the device a block at a time.
        strategy: of self-attention; see `meshdiff.attention`.

    Example:
        >>> mesh = init_mesh(Layout(cfg=1, cp=1))
        >>> video = Pipeline(DigitsModel.load(), mesh).generate(Request("a 7 moving left"))
        >>> video.shape  # [frames, channels, height, width]
        torch.Size([16, 1, 32, 32])
    """

    def __init__(
        self,
        model: VideoModel,
        mesh: DeviceMesh,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        shard_weights: bool = False,
        offload: bool = False,
        strategy: str = AUTO,
    ) -> None:
        self.model, self.mesh = model, replica(mesh)
        self.replica = mesh.get_local_rank(DP) if DP in (mesh.mesh_dim_names or ()) else 0
        device = torch.device(mesh.device_type)  # of a GPU, the one that `init_mesh` chose
        storage = Storage(device, self.mesh["cp"], ranks_of_replica(mesh) if shard_weights else None, offload)
        for expert, transformer in enumerate(model.transformers):
            for module in transformer.modules():
                if isinstance(module, MeshAttention):
                    module.strategy = strategy
            if compile:
                for block in transformer.blocks:
                    block.compile(fullgraph=True, dynamic=False)
            load = partial(model.fill, expert, device=device, dtype=dtype)
            _put_weights(transformer, load, storage)

    @torch.no_grad()
    def generate(
        self,
        request: Request,
        branches: Sequence[str] | None = None,
        combine: Combine | None = None,
        on_step: Callable[[int], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Tensor:
        """Run a request; every rank of the mesh has to call this.

        Args:
            request: the clip to make; `prepare_request` checks that the model and the layout can do it.
            branches: a prompt for each guidance branch, any number of at least
                `cfg`; by default the prompt and, if guided, the negative prompt.
            combine: makes one velocity of the branches'; by default
                classifier-free guidance at the request's scale for the expert.
            on_step: called with the number of each finished step.
            on_stage: called when "reading prompt", "sampling" and "decoding" begin.

        Returns:
            The clip on every rank, float32 `[frames, channels, height, width]` in [-1, 1].
        """
        begin = on_stage or (lambda stage: None)
        begin("reading prompt")
        request = self.model.prepare(request)
        cp = self.mesh["cp"]
        branches = request.branches if branches is None else branches
        text = self.model.encode(branches, self.mesh)
        rope = tuple(place(table.to(cp.device_type), cp, [POSITIONS]) for table in self.model.rope(request))
        noise = on_each_rank(self.model.noise)(request).to(cp.device_type)
        start = place(noise, self.mesh, [REPLICATED, SEQUENCE])

        @lru_cache(maxsize=1)  # an expert that has had its turn has had it for good
        def context(expert: int) -> DTensor:
            return divide_branches(self.model.transformers[expert].encode_text(text), self.mesh)

        def velocity(x: Tensor, time: float) -> Tensor:
            expert = self.model.expert(time)
            # One time for all branches: what it makes of itself must not depend on how many there are.
            now = place(torch.full((1,), time * self.model.time_unit, device=cp.device_type), cp, [REPLICATED])

            def denoise(tokens: Tensor, context: Tensor) -> Tensor:
                return self.model.transformers[expert](tokens, now, context, rope)

            scale = request.guidance_scales[min(expert, len(request.guidance_scales) - 1)]
            guide = combine or classifier_free(scale)
            return guide(run_branches(denoise, x, context(expert), len(branches)))

        begin("sampling")
        times, solver = self.model.schedule(request)
        end = sample(velocity, start, times, solver, on_step)
        begin("decoding")
        assert isinstance(end, DTensor)
        return self.model.decode(unwrap(end.full_tensor()), request, self.mesh)


def _put_weights(transformer: nn.Module, load: Callable[[Sequence[str]], None], storage: Storage) -> None:
    """Load the weights into the memory that `storage` names."""
    if any(isinstance(module, Streamed) for module in transformer.modules()):
        raise ValueError("the module's weights are on a mesh already; load it again for another one")
    if storage.divided is None and not storage.on_host:
        load([name for name, _ in transformer.named_parameters()])
        replicate_module(transformer, storage.mesh)
    else:
        stream(transformer, transformer.order, load, storage)
        replicate_buffers(transformer, storage.mesh)
