from __future__ import annotations

import copy
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from meshdiff import CommsCounter, InputError, Layout, init_mesh, simulate
from meshdiff.cli.main import main
from meshdiff.distributed.mesh import place, replicate_module
from meshdiff.distributed.simulation import rank_values, unwrap


def products_of_shards() -> int:
    """Compare linear layers of rows with the same rows of the whole; the number of cases in which bits differ."""
    torch.manual_seed(0)
    init_mesh(Layout(), "cpu")
    torch.set_num_threads(1)
    differ = 0
    for in_features, out_features in product((48, 64, 192, 256), (64, 192, 256)):
        rows, linear = torch.randn(400, in_features), torch.nn.Linear(in_features, out_features)
        whole = linear(rows)
        for start, size in product((0, 7), range(4, 80)):
            differ += not torch.equal(linear(rows[start : start + size].clone()), whole[start : start + size])
    return differ


def test_a_shard_has_the_bits_of_the_whole_in_a_process_that_has_set_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    program = "import sys; from tests.distributed.test_mesh import products_of_shards; sys.exit(products_of_shards())"
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=120).returncode == 0


def test_the_command_sets_the_order_of_sums(monkeypatch):
    monkeypatch.delenv("MKL_CBWR")
    monkeypatch.setattr("meshdiff.cli.main.end_process", sys.exit)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["MKL_CBWR"] == "AUTO,STRICT"


@pytest.mark.parametrize(
    ("world_size", "guided", "layout"),
    [
        (1, True, Layout(1, 1)),
        (2, True, Layout(2, 1)),
        (3, True, Layout(1, 3)),
        (4, True, Layout(2, 2)),
        (6, True, Layout(2, 3)),
        (8, True, Layout(2, 4)),
        (16, True, Layout(2, 8)),
        (64, True, Layout(2, 32)),
        (2, False, Layout(1, 2)),
        (8, False, Layout(1, 8)),
    ],
)
def test_auto_follows_the_scaling_guideline(world_size, guided, layout):
    assert Layout.auto(world_size, guided) == layout


@pytest.mark.parametrize(
    ("world_size", "branches", "cfg", "cp", "layout"),
    [
        (4, 2, None, None, Layout(2, 2)),
        (4, 1, None, None, Layout(1, 4)),
        (4, 2, 1, None, Layout(1, 4)),
        (4, 2, 2, None, Layout(2, 2)),
        (4, 2, None, 2, Layout(2, 2)),
        (4, 2, None, 4, Layout(1, 4)),
        (1, 2, 2, 4, Layout(2, 4)),
        (1, 2, None, 4, Layout(1, 4)),
        (1, 2, 2, None, Layout(2, 1)),
        (1, 2, None, None, Layout(1, 1)),
    ],
)
def test_what_is_not_asked_for_follows_from_the_world(world_size, branches, cfg, cp, layout):
    assert Layout.resolve(world_size, branches, cfg, cp) == layout


@pytest.mark.parametrize(
    ("world_size", "branches", "cfg", "cp", "message"),
    [
        (4, 2, 2, 4, "start it with: torchrun --nproc-per-node 8 "),
        (4, 2, None, 3, "start it with: torchrun --nproc-per-node 3 "),
        (4, 2, 4, 1, "--cfg 4: this run has 2 guidance branches; use --cfg 2"),
        (2, 1, 2, None, r"this run has 1 guidance branch \(guidance scale 1\); use --cfg 1"),
        (4, 1, None, 2, r"--cfg 2 \(what --cp 2 leaves of 4 processes\)"),
        (1, 2, 0, None, "--cfg: 0 given, needs at least 1"),
        (4, 2, None, 0, "--cp: 0 given, needs at least 1"),
        (1, 2, None, -3, "--cp: -3 given, needs at least 1"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_clear_error(world_size, branches, cfg, cp, message):
    with pytest.raises(InputError, match=message):
        Layout.resolve(world_size, branches, cfg, cp)


def test_a_mesh_needs_a_world_of_its_size():
    with simulate(4), pytest.raises(InputError, match="needs 8 processes and there are 4; start it with: torchrun"):
        init_mesh(Layout(2, 4), "cpu")


def test_ranks_that_share_a_sequence_are_neighbours():
    with simulate(8):
        mesh = init_mesh(Layout(cfg=2, cp=4), "cpu")
        assert mesh.mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert mesh.mesh_dim_names == ("cfg", "cp")


def test_place_keeps_each_ranks_part_of_a_tensor():
    x = torch.arange(7)
    with simulate(3):
        sharded = place(x, init_mesh(Layout(1, 3), "cpu")["cp"], [Shard(0)])
        parts = [part.tolist() for part in rank_values(sharded.to_local())]
    assert parts == [[0, 1, 2], [3, 4, 5], [6]]


def test_replicate_module_makes_every_parameter_and_buffer_a_dtensor():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with simulate(2):
        mesh = init_mesh(Layout(1, 2), "cpu")["cp"]
        replicate_module(module, mesh)
        tensors = [*module.parameters(), *module.buffers()]
        assert len(tensors) == 7
        assert all(isinstance(t, DTensor) and t.placements == (Replicate(),) for t in tensors)


def test_linear_layers_on_a_mesh_take_uneven_shards_of_a_batch():
    linear, x, gradient = torch.nn.Linear(4, 3), torch.randn(2, 7, 4, requires_grad=True), torch.randn(2, 7, 3)
    expected = linear(x)
    expected.backward(gradient)
    with simulate(3):
        mesh = init_mesh(Layout(1, 3), "cpu")["cp"]
        on_mesh = replicate_module(copy.deepcopy(linear), mesh)
        shards = place(x.detach(), mesh, [Shard(1)]).requires_grad_()
        with CommsCounter(mesh) as comms:
            output = on_mesh(shards)
            output.backward(place(gradient, mesh, [Shard(1)]))
        assert comms.as_dict() == {}
        assert output.placements == shards.grad.placements == (Shard(1),)
        torch.testing.assert_close(unwrap(output.full_tensor()), expected)
        tensors = ((shards, x), (on_mesh.weight, linear.weight), (on_mesh.bias, linear.bias))
        for found, alone in tensors:
            torch.testing.assert_close(unwrap(found.grad.full_tensor()), alone.grad)
