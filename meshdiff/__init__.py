"""Video diffusion transformers over many devices, written once, made parallel by placements."""

from __future__ import annotations

from meshdiff.attention import (
    ContextParallel,
    MeshAttention,
    explain_strategy,
    joint_attention,
    mesh_attention,
    sharded_attention,
)
from meshdiff.autoshard import parallelize
from meshdiff.diffusion.request import Request
from meshdiff.distributed.comms import CommsCounter
from meshdiff.distributed.mesh import Layout, init_mesh, place
from meshdiff.distributed.simulation import simulate
from meshdiff.errors import InputError
from meshdiff.models import DigitsModel
from meshdiff.pipeline import Pipeline

__all__ = [
    "CommsCounter",
    "ContextParallel",
    "DigitsModel",
    "InputError",
    "Layout",
    "MeshAttention",
    "Pipeline",
    "Request",
    "explain_strategy",
    "init_mesh",
    "joint_attention",
    "mesh_attention",
    "parallelize",
    "place",
    "sharded_attention",
    "simulate",
]

__version__ = "0.1.0"
