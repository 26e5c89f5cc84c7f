"""One text-to-video run on a (cfg, cp) mesh, from request to frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshdiff.attention.problem import chunk_sizes
from meshdiff.errors import InputError
from meshdiff.guidance import Combine, classifier_free, divide_branches, run_branches
from meshdiff.mesh import Layout, place, replicate_module
from meshdiff.models import VideoModel
from meshdiff.placements import POSITIONS, SEQUENCE, WHOLE
from meshdiff.request import Request
from meshdiff.sampling import SOLVERS, flow_times, sample
from meshdiff.simulation import on_each_rank, unwrap

__all__ = ["Pipeline", "check_request"]


def check_request(model: VideoModel, request: Request, layout: Layout) -> None:
    """Raise `InputError` if the model or the layout cannot do the request."""
    model.check(request)
    tokens = math.prod(model.grid(request))
    if 0 in chunk_sizes(tokens, layout.cp):
        most = max(n for n in range(1, layout.cp) if 0 not in chunk_sizes(tokens, n))
        raise InputError(
            "--cp", f"{layout.cp} ranks leave some without any of this clip's {tokens} tokens; use --cp {most} or fewer"
        )


class Pipeline:
    """A model on a mesh.

    Args:
        model: its transformer's weights become DTensors on `mesh["cp"]`, in place.
        mesh: 2-D, dims ("cfg", "cp"), from `init_mesh`.
        dtype: of weights and activations; the sampler's state stays float32.
        compile: compile each block with `torch.compile`.

    Example:
        >>> mesh = init_mesh(Layout(cfg=1, cp=1))
        >>> video = Pipeline(DigitsModel.load(), mesh).generate(Request("a 7 moving left"))
        >>> video.shape  # [frames, channels, height, width]
        torch.Size([16, 1, 32, 32])
    """

    def __init__(
        self, model: VideoModel, mesh: DeviceMesh, dtype: torch.dtype = torch.float32, compile: bool = False
    ) -> None:
        self.model, self.mesh = model, mesh
        model.transformer.to(device=mesh.device_type)
        for parameter in model.transformer.parameters():  # not buffers: frequencies need float32
            parameter.data = parameter.data.to(dtype)
        replicate_module(model.transformer, mesh["cp"])
        if compile:
            for block in model.transformer.blocks:
                block.compile(fullgraph=True, dynamic=False)

    @torch.no_grad()
    def generate(
        self,
        request: Request,
        branches: Sequence[str] | None = None,
        combine: Combine | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Run a request; every rank of the mesh has to call this.

        Args:
            request: what to make; `check_request` tells whether it can be done.
            branches: a prompt for each guidance branch, any number of at least
                `cfg`; by default the prompt and, if guided, the negative prompt.
            combine: makes one velocity of the branches'; by default
                classifier-free guidance at the request's scale.
            on_step: called with the number of each finished step.

        Returns:
            The clip on every rank, float32 `[frames, channels, height, width]` in [-1, 1].
        """
        combine = combine or classifier_free(request.guidance_scale)
        cp = self.mesh["cp"]
        branches = request.branches if branches is None else branches
        context = divide_branches(self.model.encode(branches, cp), self.mesh)
        rope = tuple(place(table.to(cp.device_type), cp, [POSITIONS]) for table in self.model.rope(request))
        noise = on_each_rank(self.model.noise)(request).to(cp.device_type)
        start = place(noise, self.mesh, [WHOLE, SEQUENCE])

        def velocity(x: Tensor, time: float) -> Tensor:
            # One time for all branches: what it makes of itself must not depend on how many there are.
            now = place(torch.full((1,), time, device=cp.device_type), cp, [WHOLE])

            def denoise(tokens: Tensor, context: Tensor) -> Tensor:
                return self.model.transformer(tokens, now, context, rope)

            return combine(run_branches(denoise, x, context, len(branches)))

        times = flow_times(request.steps, request.shift)
        end = sample(velocity, start, times, SOLVERS[request.solver](), on_step)
        assert isinstance(end, DTensor)
        return self.model.decode(unwrap(end.full_tensor()), request)
