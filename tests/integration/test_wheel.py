"""The package as people install it: from a wheel, without a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of programs of an environment that has the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", ROOT], check=True)
    (wheel,) = (folder / "dist").glob("meshdiff-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # Folders that a .pth file names are searched, but their own .pth files are not read: no editable install is found.
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    return folder / "venv" / "bin"


def run(installed: Path, folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [installed / program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_an_installed_wheel_makes_a_clip_on_ranks_that_it_starts(installed, tmp_path):
    where = run(installed, tmp_path, "python", "-c", "import meshdiff; print(meshdiff.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed.parent), where.stderr
    flags = ["--cfg", "2", "--steps", "2", "--frames", "8", "--wandb", "disabled", "--out", "clip"]
    made = run(installed, tmp_path, "meshdiff", "run", *flags)
    assert made.returncode == 0, made.stderr
    assert "torchrun --nproc-per-node 2 --no-python meshdiff run --cfg 2" in made.stdout
    metrics = json.loads((tmp_path / "clip" / "metrics.json").read_text())
    assert metrics["layout"] == {"cfg": 2, "cp": 1, "dp": 1}
    assert (tmp_path / "clip" / "video.mp4").stat().st_size > 0


def test_the_command_says_what_it_has(installed, tmp_path):
    shown = run(installed, tmp_path, "meshdiff")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "meshdiff COMMAND" in shown.stdout
    wrong = run(installed, tmp_path, "python", "-m", "meshdiff", "walk")
    assert wrong.returncode == 2
    assert wrong.stderr == "meshdiff: 'walk' is no command; name one of run, sweep\n"


def test_a_missing_extra_is_one_line(installed, tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('no tyro', name='tyro')\n")
    lacking = run(installed, tmp_path, "python", "-m", "meshdiff", "sweep", "--help")  # -m looks in the folder first
    assert (lacking.returncode, lacking.stderr) == (2, "meshdiff sweep: needs tyro; pip install 'meshdiff[sweep]'\n")
