"""Convolutions and their like on rows: what one device makes of them, each rank with its rows and a halo."""

from __future__ import annotations

from typing import Any

import draws
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from image_cases import Program, drawn, on_mesh, on_ranks, randn
from ranks import run_on_ranks

from meshdiff import Layout, init_mesh, simulate
from meshdiff.distributed.consensus import all_gather_object

BOUND = 2e-5
FLOAT = 4  # bytes


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_a_drawn_program_is_that_of_one_device(ranks):
    with simulate(ranks):
        mesh = init_mesh(Layout(cp=ranks), "cpu")["cp"]
        for seed in range(ranks * 1000, ranks * 1000 + draws.times(40)):
            program = drawn(seed)
            error, replicated, _ = on_mesh(program, mesh)
            assert error <= BOUND, (seed, program.code, program.shape)
            assert replicated == [], (seed, program.code, program.shape)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_drawn_program_is_that_of_one_device_on_real_ranks(ranks, tmp_path):
    seeds = range(ranks * 2000, ranks * 2000 + draws.times(40))
    for found in run_on_ranks(on_ranks, ranks, tmp_path, seeds):
        for seed, (error, replicated, _) in found.items():
            assert error <= BOUND, (seed, drawn(seed).code)
            assert replicated == [], (seed, drawn(seed).code)


WEIGHT = randn(4, 4, 3, 3, seed=1)

CONTRACT = {
    # A row of 4 channels and 6 columns to each neighbour.
    "convolution": (Program((1, 4, 12, 6), lambda x: F.conv2d(x, WEIGHT, padding=1), "conv"), "all_to_all", 4 * 6),
    # The rows of zeros before and after are on no rank; columns of zeros are there already.
    "padded convolution": (
        Program((1, 4, 12, 6), lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), WEIGHT), "conv"),
        "all_to_all",
        4 * 8,
    ),
    "local convolution": (Program((1, 4, 12, 6), lambda x: F.conv2d(x, WEIGHT[:, :, :1, :1]), "conv"), None, 0),
    "resizing": (Program((1, 4, 12, 6), lambda x: F.interpolate(x, scale_factor=2) * 2, "resize"), None, 0),
    # Mean and variance of 2 groups.
    "norm": (Program((1, 4, 12, 6), lambda x: F.group_norm(x, 2), "norm"), "all_gather", 2 * 2),
}


def of_contract(name: str) -> dict[str, Any]:
    mesh = init_mesh(Layout(cp=dist.get_world_size()), "cpu")["cp"]
    _, _, sent = on_mesh(CONTRACT[name][0], mesh)
    return all_gather_object(sent)


def expected(name: str, ranks: int, rank: int) -> dict[str, Any]:
    """The traffic of a rank: that of the program, and its rows of the output for each other rank."""
    program, collective, numbers = CONTRACT[name]
    with torch.no_grad():
        made = program.run(randn(*program.shape)).numel()
    sent = {"all_gather": {"count": 1, "bytes": FLOAT * (ranks - 1) * made // ranks}}
    receivers = ranks - 1 if collective == "all_gather" else (rank > 0) + (rank < ranks - 1)
    if collective is not None:
        of_program = sent.setdefault(collective, {"count": 0, "bytes": 0})
        of_program["count"] += 1
        of_program["bytes"] += FLOAT * numbers * receivers
    return sent


@pytest.mark.parametrize("name", CONTRACT)
def test_ranks_send_their_halo_and_nothing_else(name, tmp_path):
    for ranks in (2, 3):
        found = run_on_ranks(of_contract, ranks, tmp_path, name)
        assert found == [expected(name, ranks, rank) for rank in range(ranks)]
        with simulate(ranks):  # which counts what the rank sends that sends most
            _, _, sent = on_mesh(CONTRACT[name][0], init_mesh(Layout(cp=ranks), "cpu")["cp"])
        assert sent == expected(name, ranks, 1)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: F.conv2d(x, WEIGHT, padding="same", stride=2),
        lambda x: F.conv2d(x, WEIGHT, padding="none"),
        lambda x: F.conv_transpose2d(x, WEIGHT, stride=2, output_padding=(3, 0)),
        lambda x: F.avg_pool2d(x, 2, stride=0),
        lambda x: F.group_norm(x, 3),
    ],
)
def test_what_one_device_refuses_is_refused(run):
    program = Program((1, 4, 7, 6), run, "")
    with pytest.raises(RuntimeError) as expected:
        run(randn(*program.shape))
    with simulate(2), pytest.raises(RuntimeError) as found:
        on_mesh(program, init_mesh(Layout(cp=2), "cpu")["cp"])
    assert str(found.value) == str(expected.value)
