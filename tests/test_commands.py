"""Commands in README and docs: each is run here, or stands in a list of those that need what a test does not have."""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image
from ranks import ROOT, run_command

from meshdiff.cli.run import main

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "notebooks/README.md",
]
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:python3?|torchrun|meshdiff|pip|pytest|pre-commit|sbatch|wandb|hf) "
SMALL = {"--steps": "1", "--frames": "8", "--wandb": "disabled"}

ELSEWHERE = {
    r"python3 -m venv .*": "what CI runs",
    r"pip install .*": "needs the network",
    r"pre-commit install": "changes the repository",
    r"pytest.*": "runs tests",
    r".*--checkpoint (/data/|FOLDER).*": "needs weights of 14 B parameters",
    r"torchrun --nnodes .*": "needs several machines; tests/integration runs two launchers on one",
    r"torchrun --max-restarts 2": "a part of a command; tests/integration restarts ranks",
    r"wandb .*": "needs an account; tests/cli/test_sweep.py runs the command of a W&B agent",
    r"python experiments/sweep\.py.*": "takes minutes; tests/cli/test_sweep.py runs sweeps of one cell",
    r"(python|torchrun --nproc-per-node 2) -m experiments\.benchmarks\..*": "takes minutes, on an idle machine",
    r"python -m experiments\.tools\.(autoencoders|diffusers|schedulers)_coverage.*": "takes minutes; tests try each",
    r"python -m experiments\.(evaluate|train)_digits.*": "takes minutes; tests/models/test_digits.py runs its parts",
    r"python -m experiments\.tools\.flag_reference.*": "tests/test_repository.py compares what it prints",
    r"python -m pip wheel .*": "tests/integration/test_wheel.py builds it",
    r"meshdiff (run|sweep)": "the name of a command",
    r"python experiments/run\.py --cp 4 --cfg 2": "starts 8 processes; tests/cli/test_run.py starts fewer that way",
}
"""Commands that no test here runs, as patterns, and why."""


def commands() -> list[str]:
    """Every command in a block of code, or in code between words."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if language not in ("", "bash"):
                continue
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [re.split(r"\s{3,}|\s+# ", line.strip())[0] for line in lines if re.match(PROGRAMS, line.strip())]
        words = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        found += [" ".join(code.split()) for code in re.findall(rf"`({PROGRAMS}[^`]+)`", words)]
    return list(dict.fromkeys(found))


RUN_HERE = [command for command in commands() if not any(re.fullmatch(pattern, command) for pattern in ELSEWHERE)]


def test_commands_are_found_and_no_reason_is_left_over():
    assert len(RUN_HERE) >= 8
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, command) for command in commands()), pattern


def make(command: str) -> None:
    """Run a `python -m` command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["", *shlex.split(command)[3:]])
        with contextlib.suppress(SystemExit):
            runpy.run_module(shlex.split(command)[2], run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with what the commands of the docs name: a list, and the tiny models that other commands make."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "prompts.txt").write_text("a 7 moving left\na 3\n")
    for name in ("first", "last"):
        Image.radial_gradient("L").save(folder / f"{name}.png")
    imageio.mimwrite(folder / "clip.mp4", [np.full((32, 48, 3), 40 * frame, np.uint8) for frame in range(5)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in RUN_HERE:
            if command.startswith("python -m experiments."):
                make(command)
    return folder


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_of_the_docs_runs(command, folder, tmp_path, monkeypatch):
    words = shlex.split(command)
    if words[1] == "-m":
        assert any((folder / words[words.index("--out") + 1]).iterdir())
        return
    for made in folder.iterdir():
        (tmp_path / made.name).symlink_to(made)
    monkeypatch.chdir(tmp_path)
    at = next(n for n, word in enumerate(words) if word.endswith("run.py") or word == "run")
    launcher, flags = words[:at], words[at + 1 :]
    small = {name: value for name, value in SMALL.items() if name not in flags}
    if "diffusers" in flags:  # the pipeline makes images, or has the frames of its inputs
        small.pop("--frames", None)
    flags += [word for flag in small.items() for word in flag]
    if "--nproc-per-node" in launcher:
        ranks = int(launcher[launcher.index("--nproc-per-node") + 1])
        ended = run_command(flags, ranks, tmp_path, cwd=tmp_path)
        assert not any(ended.exit_codes), ended
    else:
        assert main(flags) == 0
