"""Running any model and any pipeline of diffusers on a mesh, with its code unchanged.

    pipeline = DiffusionPipeline.from_pretrained(...)
    parallel = parallelize(pipeline, init_mesh(Layout(cfg=2, cp=4)))
    video = pipeline(prompt, generator=torch.Generator().manual_seed(0)).frames

Every rank runs the pipeline, and gets the same images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshdiff.attention.strategy import AUTO
from meshdiff.autoshard import NO_CAPTURE, Backend, Guidance, Parallelized, Report, StoredWeights, storage_of
from meshdiff.autoshard import parallelize as parallelize_module
from meshdiff.distributed.mesh import ranks_of_replica

__all__ = ["Parallel", "parallelize"]


# Modular pipelines are no DiffusionPipeline, and older versions of diffusers have none.
PIPELINES = tuple(
    kind
    for name in ("DiffusionPipeline", "ModularPipeline")
    if isinstance(kind := getattr(diffusers, name, None), type)
)


HEIGHT = -2
"""The dim of images and videos `[batch, channels, (frames,) height, width]` whose rows are shared."""
LENGTH = -1
"""The dim of sound `[batch, channels, length]` that is shared."""


@dataclass(frozen=True)
class Parallel:
    """Models on a mesh.

    Attributes:
        models: those that share the sequence, by name.
        encoders: text encoders that share the tokens of prompts, by name.
        autoencoders: decoders and encoders that share the rows of images, by name, `vae.decoder` say.
        guidance: those that share the guidance branches, by name.
        weights: of models whose weights are divided or in host memory, what is stored where, by name.
    """

    models: dict[str, Parallelized]
    guidance: dict[str, Guidance]
    encoders: dict[str, Parallelized] = field(default_factory=dict)
    autoencoders: dict[str, Parallelized] = field(default_factory=dict)
    weights: dict[str, StoredWeights] = field(default_factory=dict)

    def report(self) -> dict[str, Report]:
        """The report of each model that has been called; see `meshdiff.parallelize`."""
        return {
            name: replace(model.report(), weights=str(self.weights.get(name, "")))
            for name, model in {**self.models, **self.encoders, **self.autoencoders}.items()
            if model.was_called
        }

    def captured(self) -> dict[str, str]:
        """The outcome of capturing the calls of each model, in one line; none if capture was not requested."""
        return {name: model.captured for name, model in self.models.items() if model.captured}

    def fallbacks(self) -> dict[str, str]:
        """The reason why every rank of `cfg` does all calls of a model, by its name; none where they are divided."""
        reasons = {name: guidance.fallback or guidance.undivided for name, guidance in self.guidance.items()}
        return {name: reason for name, reason in reasons.items() if reason}

    def remove(self) -> None:
        """Take the models off the mesh."""
        for weights in self.weights.values():
            weights.remove()
        self.weights.clear()
        for of_model in (self.guidance, self.models, self.encoders, self.autoencoders):
            for handle in of_model.values():
                handle.remove()


def rows_of(half: nn.Module) -> int:
    """The dim that ranks share of what an autoencoder decodes or encodes."""
    flat = any(isinstance(part, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)) for part in half.modules())
    return HEIGHT if flat else LENGTH


def _halves(vae: nn.Module) -> dict[str, nn.Module]:
    """The encoder and the decoder of an autoencoder."""
    halves = {name: getattr(vae, name, None) for name in ("encoder", "decoder")}
    return {name: half for name, half in halves.items() if isinstance(half, nn.Module)}


def writes_text(args: Any, kwargs: Any) -> bool:
    """True for a call of a language model that goes on from a cache, or is to make one that is used."""
    return kwargs.get("past_key_values") is not None or bool(kwargs.get("use_cache"))


def parallelize(
    model: nn.Module | DiffusionPipeline,
    mesh: DeviceMesh,
    *,
    strategy: str = AUTO,
    verify: bool = False,
    capture: bool | Backend = False,
    shard_weights: bool = False,
    offload: bool = False,
    offload_text: bool = False,
    shard_text: bool = True,
    shard_vae: bool = True,
) -> Parallel:
    """Put a model of diffusers, or the transformers, text encoders and autoencoders of a pipeline, on a mesh.

    Ranks along `cp` share the sequence, as in `meshdiff.parallelize`. Ranks
    along `cfg` share the guidance branches: the rows of a doubled batch, or the
    two or three calls of the transformer that a step makes. All ranks share the
    tokens of the prompts that a text encoder reads, and the rows of the images
    that an autoencoder decodes or encodes.

    Every rank is to call it with the same arguments; for a pipeline, give each
    call a `generator` of the same seed.

    Args:
        model: a model, or a pipeline whose `transformer`, `transformer_2`, ... are meant.
        mesh: `mesh["cp"]`, `mesh["cfg"]` or the 2-D `(cfg, cp)` mesh.
        strategy: of mesh attention, see `meshdiff.mesh_attention`.
        verify: compare the first call with that of the original model; see `meshdiff.parallelize`.
        capture: run calls that have settled as graphs, without the model's Python; see `meshdiff.parallelize`.
        shard_weights: each rank of `cp` stores a part of the weights of the transformers, each rank of the mesh one of
            those of the text encoders and the VAE, and gathers those of a block at a time; see `meshdiff.parallelize`.
        offload: those of the transformers are stored in host memory.
        offload_text: those of the text encoders are.
        shard_text: share the tokens of prompts between all ranks of the mesh, in the text encoders of a pipeline; calls
            that go on from a cache of keys and values, to write text, are done by every rank.
        shard_vae: share the rows of images between all ranks of the mesh, in the decoders and encoders of a pipeline;
            what comes out differs from one rank's in the last bits, as sums are added up in another order.

    Raises:
        ValueError: for a pipeline without transformer, or another mesh; and as `meshdiff.parallelize`.
    """
    names = mesh.mesh_dim_names or ()
    if not names or set(names) - {"cfg", "cp"}:
        raise ValueError(f'parallelize takes a mesh of dims "cfg" and "cp"; given {names or "dims without names"}')
    encoders: dict[str, nn.Module] = {}
    vaes: dict[str, nn.Module] = {}
    if isinstance(model, PIPELINES):
        parts = {name: part for name, part in vars(model).items() if isinstance(part, nn.Module)}
        modules = {name: part for name, part in parts.items() if name.startswith("transformer")}
        encoders = {name: part for name, part in parts.items() if "text_encoder" in name}
        vaes = {name: part for name, part in parts.items() if hasattr(part, "decode") and _halves(part)}
        if not modules:
            raise ValueError(
                f"{type(model).__name__} has no transformer to share out; its models are {', '.join(parts)}"
            )
    elif isinstance(model, nn.Module):
        modules = {type(model).__name__: model}
    else:
        raise ValueError(f"parallelize takes a model or a pipeline of diffusers; given a {type(model).__name__}")
    if capture and (shard_weights or offload):
        raise ValueError(NO_CAPTURE)
    parallel = Parallel({}, {})
    everyone = mesh if mesh.ndim == 1 else ranks_of_replica(mesh)
    try:
        for name, module in modules.items():
            if "cp" in names:
                along_cp = mesh["cp"] if mesh.ndim > 1 else mesh
                parallel.models[name] = parallelize_module(
                    module, along_cp, strategy=strategy, verify=verify, capture=capture
                )
            if "cfg" in names:
                parallel.guidance[name] = Guidance(module, mesh["cfg"] if mesh.ndim > 1 else mesh)
        for name, module in encoders.items() if shard_text else ():
            if not any(one.module is module for one in parallel.encoders.values()):
                parallel.encoders[name] = parallelize_module(
                    module, everyone, strategy=strategy, verify=verify, aside=writes_text
                )
        for name, vae in vaes.items() if shard_vae else ():
            for half, module in _halves(vae).items():
                parallel.autoencoders[f"{name}.{half}"] = parallelize_module(
                    module, everyone, dim=rows_of(module), verify=verify
                )
        # Ranks of cfg run other branches, which may take other ways through the model: they never gather together.
        together = (mesh["cp"] if mesh.ndim > 1 else mesh) if "cp" in names else False
        for kind, on_host, ranks in (
            (modules, offload, together),
            (encoders, offload_text, everyone),
            (vaes, False, everyone),
        ):
            storage = storage_of(mesh, ranks if shard_weights else False, on_host)
            for name, module in kind.items():
                if storage is not None and not any(one.module is module for one in parallel.weights.values()):
                    parallel.weights[name] = StoredWeights(module, storage)
    except Exception:
        parallel.remove()  # a pipeline is on the mesh as a whole, or not at all
        raise
    return parallel
