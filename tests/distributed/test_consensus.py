from __future__ import annotations

import on_ranks
import pytest
from ranks import run_on_ranks

from meshdiff import InputError
from meshdiff.distributed.consensus import agreed, all_gather_object, check_same


def test_every_rank_hears_of_one_ranks_failure_of_different_flags_and_of_different_meetings(tmp_path):
    heard = run_on_ranks(on_ranks.agreement, 3, tmp_path)
    for rank, lines in enumerate(heard):
        here, there, other = ("the end", "the beginning", 0) if rank == 1 else ("the beginning", "the end", 1)
        assert lines == [
            "rank 1 of 3: --weights: no such file",
            "--seed: is 0 on rank 0 and 1 on rank 1; start every rank with the same",
            f"ranks do not do the same: one is at {here}, rank {other} of this mesh at {there}",
        ]


def test_one_process_agrees_with_itself():
    assert all_gather_object(5) == [5]
    check_same({"--seed": 0})
    with pytest.raises(InputError, match="--prompt: is empty"), agreed():
        raise InputError("--prompt", "is empty")
