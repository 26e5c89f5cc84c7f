"""Lists of requests: replicas take them in turn, bad ones are recorded, and a killed run goes on where it was."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from clips import FAILED, FLAGS, NAMES, clips, list_alone, records
from ranks import run_command

from meshdiff import InputError, Layout, Request, init_mesh, simulate
from meshdiff.cli.queue import Counter, Record, resume, take_turns
from meshdiff.cli.request_list import read_requests
from meshdiff.cli.run import main
from meshdiff.distributed.mesh import ranks_of_replica, replica


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return list_alone(tmp_path_factory.mktemp("alone"))


def test_good_requests_are_done_and_bad_ones_recorded(alone):
    assert sorted(clips(alone / "out")) == sorted(NAMES)
    found = records(alone / "out")
    assert {name: line["status"] for name, line in found.items()} == {
        **dict.fromkeys(NAMES, "ok"),
        **dict.fromkeys(FAILED, "failed"),
    }
    assert found["0003-failed"]["error"].startswith("line: unknown field 'promp'")
    assert found["0004-a-5-moving-sideways"]["error"].startswith("--prompt: unknown word 'sideways'")
    metrics = json.loads((alone / "out" / "three" / "metrics.json").read_text())
    assert (metrics["seed"], metrics["steps"]) == (4, 2)


def test_replicas_of_several_ranks_make_the_same_clips(alone, tmp_path):
    flags = [*FLAGS, "--prompts", str(alone / "list.txt"), "--dp", "2", "--out", str(tmp_path / "out")]
    ranks = run_command([*flags, "--shard-weights"], 4, tmp_path)
    assert ranks.exit_codes == [1] * 4
    assert "dp2-cfg2-cp1: 4 requests are 2 turns of 2 replicas of 2 ranks" in ranks.stdout[0]  # two are bad
    assert "[rank" not in "".join(ranks.stderr)
    assert ranks.reports == [f"2 of 6 requests failed; {tmp_path / 'out' / 'results.jsonl'} says why"] * 4
    expected, found = clips(alone / "out"), clips(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    done = records(tmp_path / "out")
    assert {done[name]["replica"] for name in NAMES} == {0, 1}
    metrics = json.loads((tmp_path / "out" / "three" / "metrics.json").read_text())
    assert metrics["layout"] == {"dp": 2, "cfg": 2, "cp": 1}
    assert set(metrics["comms"]) == {"cfg", "other"}  # the latter are weights; replicas send each other nothing
    assert metrics["comms"]["other"].keys() == {"all_gather"}
    assert metrics["replica"] == done["three"]["replica"]


def test_resume_does_nothing_twice_and_mistakes_no_request_for_another(alone, tmp_path, capfd):
    out, stamp = alone / "out", lambda: {p: p.stat().st_mtime_ns for p in (alone / "out").glob("*/*")}
    before = stamp()
    flags = [*FLAGS, "--prompts", str(alone / "list.txt"), "--out", str(out)]
    assert main([*flags, "--resume"]) == 1
    assert stamp() == before
    assert "4 of 6 are complete" in capfd.readouterr().out
    assert main(flags) == 2
    assert f"--out: {out} is not empty; name another folder, or add --resume" in capfd.readouterr().err
    assert main([*flags, "--resume", "--seed", "9"]) == 2
    assert "--resume: 0001-a-7-moving-left was made with seed 0, and now 9 is asked for" in capfd.readouterr().err
    assert main([*flags, "--resume", "--dtype", "bfloat16"]) == 2
    assert "was made with dtype 'float32', and now 'bfloat16' is asked for" in capfd.readouterr().err
    assert stamp() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dp", "2"], "--dp: divides the requests of --prompts"),
        (["--prompts", "nowhere.txt"], "--prompts: nowhere.txt cannot be read"),
        (["--prompts", "empty.txt"], "--prompts: empty.txt holds no request"),
        (["--prompts", "utf16.txt"], "--prompts: utf16.txt is not UTF-8; save it as UTF-8"),
        (["--prompts", "latin.txt"], "--prompts: latin.txt is not UTF-8 in line 2; save it as UTF-8"),
        (["--prompts", "list.txt", "--resume"], "--resume: goes on with a list"),
        (["--prompts", "list.txt", "--overwrite"], "--overwrite: is for a single clip"),
        (["--prompts", "list.txt", "--simulate", "--dp", "2"], "--dp: one process cannot simulate replicas"),
        (["--prompts", "list.txt", "--dp", "0"], "--dp: 0 given, needs at least 1"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "list.txt").write_text("a 1\na 2\n")
    (tmp_path / "utf16.txt").write_text("a 1\na 2\n", encoding="utf-16")
    (tmp_path / "latin.txt").write_text("a 1\nun ch\xe2teau\n", encoding="latin-1")
    before = sorted(tmp_path.iterdir())
    assert main([*FLAGS, *flags]) == 2
    error = capfd.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_neighbours_are_of_one_sequence_then_of_one_guidance_then_of_one_replica():
    layout = Layout(cfg=2, cp=3, dp=2)
    with simulate(12):
        mesh = init_mesh(layout, "cpu")
        assert mesh.mesh.tolist() == torch.arange(12).view(2, 2, 3).tolist()
        assert mesh.mesh_dim_names == ("dp", "cfg", "cp")
        assert replica(mesh).mesh_dim_names == ("cfg", "cp")
        assert replica(mesh).shape == (2, 3)
        assert ranks_of_replica(mesh).size() == 6


@pytest.mark.parametrize(
    ("world", "requests", "layout"),
    [
        (8, 1, Layout(2, 4)),
        (8, 2, Layout(2, 2, dp=2)),
        (8, 100, Layout(1, 1, dp=8)),
        (8, 5, Layout(2, 4)),
        (16, 8, Layout(2, 1, dp=8)),
        (3, 3, Layout(1, 1, dp=3)),
    ],
)
def test_few_requests_take_ranks_together_and_many_take_them_apart(world, requests, layout):
    assert Layout.auto(world, requests=requests) == layout
    assert Layout.resolve(world, 2, requests=requests) == layout
    assert str(requests) in layout.reason(requests) or layout.dp == 1


def test_what_is_asked_for_stays():
    assert Layout.resolve(8, 2, cp=4, requests=100) == Layout(1, 4, dp=2)
    assert Layout.resolve(8, 2, cfg=2, requests=100) == Layout(2, 1, dp=4)
    assert Layout.resolve(8, 2, dp=2, requests=1) == Layout(2, 2, dp=2)
    assert Layout.resolve(1, 2, dp=3) == Layout(1, 1, dp=3)
    with pytest.raises(
        InputError, match="--dp 3: does not fit 8 processes; start it with: torchrun --nproc-per-node 6"
    ):
        Layout.resolve(8, 2, dp=3)


def test_turns_are_taken_once_each():
    with simulate(1):
        mesh, counter = init_mesh(Layout(), "cpu"), Counter("turns")
        assert list(take_turns(mesh, 3, counter)) == [0, 1, 2]
        assert list(take_turns(mesh, 3, counter)) == []


def test_the_record_is_put_right(tmp_path):
    base = Request("a 7 moving left", steps=2)
    entries = read_requests("a 1\na 2\na 3", base)
    requests = {entry: entry.request for entry in entries}
    fields = {"seconds_total": 1.5, **{k: v for k, v in asdict(base).items() if k != "prompt"}}
    for entry in entries[:2]:
        (tmp_path / entry.name).mkdir()
        (tmp_path / entry.name / "metrics.json").write_text(json.dumps({**fields, "prompt": entry.request.prompt}))
    (tmp_path / ".0003-a-3.partial-1").mkdir()
    Record(1, entries[0].name, "ok", seconds=1.0).append(tmp_path)
    Record(3, entries[2].name, "failed", "a rank was lost").append(tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"line": 2, "na')  # killed in the middle of a line
    assert resume(tmp_path, requests) == entries[2:]
    found = records(tmp_path)
    assert [found[e.name]["seconds"] for e in entries[:2]] == [1.0, 1.5]
    assert len(found) == 2
    assert not list(tmp_path.glob(".*"))
