"""`experiments/run.py`, but rank 1 is killed in the second step, unless torchrun has restarted it."""

from __future__ import annotations

import os
import signal
import sys

from meshdiff.cli import run
from meshdiff.distributed.launch import end_process
from meshdiff.models.video_dit import VideoDiT

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    forward, calls = VideoDiT.forward, []

    def fail_later(*args):
        calls.append(1)
        if len(calls) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*args)

    VideoDiT.forward = fail_later

end_process(run.command(sys.argv[1:]))
