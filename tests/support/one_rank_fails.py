"""`experiments/run.py`, but rank 1 runs out of memory in the second step; started by a test on several ranks."""

from __future__ import annotations

import os
import sys

import torch

from meshdiff.cli import run
from meshdiff.distributed.launch import end_process
from meshdiff.models.video_dit import VideoDiT

if os.environ["RANK"] == "1":
    forward, calls = VideoDiT.forward, []

    def fail_later(*args):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(*args)

    VideoDiT.forward = fail_later

end_process(run.command(sys.argv[1:]))
