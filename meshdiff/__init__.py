"""Video diffusion transformers over many devices, written once, made parallel by placements."""

from __future__ import annotations

from meshdiff.attention import mesh_attention
from meshdiff.comms import CommsCounter
from meshdiff.errors import InputError
from meshdiff.mesh import Layout, init_mesh
from meshdiff.models import DigitsModel
from meshdiff.pipeline import Pipeline
from meshdiff.request import Request
from meshdiff.simulation import simulate

__all__ = [
    "CommsCounter",
    "DigitsModel",
    "InputError",
    "Layout",
    "Pipeline",
    "Request",
    "init_mesh",
    "mesh_attention",
    "simulate",
]

__version__ = "0.1.0"
