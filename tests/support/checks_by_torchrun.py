"""A check of `on_ranks.py`, run by a real torchrun; saves what it returns on rank 0."""

from __future__ import annotations

import sys

import on_ranks
import torch
import torch.distributed as dist

from meshdiff.distributed.launch import end_process
from meshdiff.distributed.world import init_distributed

if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed()
    outcome = getattr(on_ranks, sys.argv[1])()
    if dist.get_rank() == 0:
        torch.save(outcome, sys.argv[2])
    dist.destroy_process_group()
    end_process(0)
