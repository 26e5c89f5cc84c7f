"""Every transformer that diffusers exports and that takes tokens, in a size that a test can run.

The sizes are chosen against the mesh: lengths and heads that 2, 3 and 4 ranks
do not divide, wherever the architecture allows it.
"""

from __future__ import annotations

from experiments.tiny_models.transformers.registry import TINY, Tiny

from experiments.tiny_models.transformers import image, image_joint, image_mixed, more, video, video_joint, world  # isort: skip  # each adds its models to the registry

__all__ = ["TINY", "Tiny", "image", "image_joint", "image_mixed", "more", "video", "video_joint", "world"]
