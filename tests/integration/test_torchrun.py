"""The command as a person types it: ranks that torchrun starts, or that one process starts itself."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import on_ranks
import pytest
import torch
from clips import FAILED, FLAGS, LIST, NAMES, SCRIPT, clips, records, video
from ranks import SUPPORT, free_port, run_command, run_on_ranks, torchrun

from meshdiff.cli.run import main


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    assert main([*FLAGS, "--out", str(out)]) == 0
    return out


def test_two_ranks_turn_guidance_parallelism_on_and_give_the_same_clip(one_process, tmp_path):
    ranks = run_command([*FLAGS, "--out", str(tmp_path / "run")], 2, tmp_path)
    assert not any(ranks.exit_codes), ranks
    assert torch.equal(video(tmp_path / "run"), video(one_process))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["layout"] == {"dp": 1, "cfg": 2, "cp": 1}
    assert len(metrics["peak_memory_bytes"]) == 2
    assert metrics["comms"]["cfg"]["all_gather"]["count"] == 2
    assert [printed.count("a 7 moving left") for printed in ranks.stdout] == [1, 0]  # only rank 0 talks


def test_two_nodes_give_the_same_clip(one_process, tmp_path):
    port = free_port()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-id", "test", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command = [*launcher, *meeting, "--local-addr", "localhost", SCRIPT, *FLAGS, "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert torch.equal(video(tmp_path / "run"), video(one_process))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["layout"] == {"dp": 1, "cfg": 2, "cp": 1}


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_one_process_starts_the_ranks_that_its_layout_needs(launcher, one_process, tmp_path):
    flags = [*FLAGS, "--cp", "2", "--cfg", "2", "--out", str(tmp_path / "run")]
    if launcher == "torchrun":
        process = torchrun(1, SCRIPT, *flags)
    else:
        process = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    command = shlex.join(["torchrun", "--nproc-per-node", "4", os.path.relpath(SCRIPT), *flags])
    assert f"starting 4 ranks on this machine, as would: {command}" in process.stdout
    assert torch.equal(video(tmp_path / "run"), video(one_process))


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_standard_input_reaches_ranks_that_are_yet_to_be_started(launcher, tmp_path):
    command = [sys.executable, SCRIPT, "--cfg", "2"]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    flags = [*FLAGS, "--steps", "1", "--prompts", "-", "--dp", "1", "--out", str(tmp_path / "out"), "--timeout", "4"]
    (tmp_path / "list.txt").write_text(LIST)
    seconds = 14 if launcher == "torchrun" else 0  # longer than the time-out of ranks that wait
    slowly = ["sh", "-c", f"sleep {seconds}; cat {tmp_path / 'list.txt'}"]
    with subprocess.Popen(slowly, stdout=subprocess.PIPE) as typing:
        process = subprocess.run([*command, *flags], stdin=typing.stdout, capture_output=True, timeout=120)
    assert sorted(clips(tmp_path / "out")) == sorted(NAMES), process.stderr
    assert records(tmp_path / "out").keys() == {*NAMES, *FAILED}
    assert {p.name for p in tmp_path.iterdir()} == {"list.txt", "out"}


def test_torchruns_report_says_of_both_ranks_what_one_line_said(tmp_path):
    message = "--prompt: unknown word 'sideways'"
    process = torchrun(2, SCRIPT, "--prompt", "a 7 moving sideways", timeout=60, cwd=tmp_path)
    said, _, report = process.stderr.partition("FAILED")
    assert said.count(message) == 1
    assert report.count("exitcode  : 2") == report.count(message) == 2
    assert "[rank" not in process.stderr  # how torch marks a rank's traceback
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_torchrun_are_what_forked_ranks_are(tmp_path):
    """Ranks of other tests are forked, see `fork_server.py`."""
    process = torchrun(2, str(SUPPORT / "checks_by_torchrun.py"), "layouts", str(tmp_path / "found.pt"))
    assert process.returncode == 0, process.stderr[-6000:]
    found, forked = torch.load(tmp_path / "found.pt"), run_on_ranks(on_ranks.layouts, 2, tmp_path)
    assert found.keys() == forked.keys()
    for layout, (clip, traffic) in found.items():
        assert torch.equal(clip, forked[layout][0])
        assert traffic == forked[layout][1]
