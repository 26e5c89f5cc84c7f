from __future__ import annotations

import json
import os
import subprocess
import sys

from ranks import EXPERIMENTS

ENDS = """
import atexit
from meshdiff.distributed.launch import end_process
atexit.register(print, "put away")
print("said", end=" ")
end_process(3)
"""


PRINTS = """
import os, sys
from meshdiff.distributed.launch import print_any_letter
print_any_letter()
print("caf\\xe9 \\u732b", os.fsdecode(b"caf\\xc3\\xa9"))
"""
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_letters_that_the_locale_lacks_are_printed_as_escapes_and_paths_as_they_were_given():
    printed = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, env={**os.environ, **ASCII})
    assert printed.stdout == b"caf\\xe9 \\u732b caf\xc3\xa9\n", printed.stderr


def test_a_folder_with_letters_that_the_locale_lacks_is_written_or_one_line(tmp_path):
    script = str(EXPERIMENTS / "run.py")
    (tmp_path / "list.txt").write_text('{"name": "caf\xe9", "prompt": "a 2"}\na 7\n', encoding="utf-8")
    flags = [
        "--frames",
        "8",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "caf\xe9"),
        "--prompts",
        str(tmp_path / "list.txt"),
    ]
    environment = {**os.environ, **ASCII}
    process = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, env=environment)
    assert process.returncode == 2
    assert process.stderr.startswith(
        "--wandb offline: W&B takes no folder or flag with letters that this locale (ascii)"
    )
    assert process.stderr.count("\n") == 1
    flags += ["--resume", "--wandb", "disabled"]
    process = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, env=environment)
    assert process.returncode == 1, process.stderr
    results = (tmp_path / "caf\xe9" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    outcomes = {line["name"]: (line["status"], line["error"]) for line in map(json.loads, results)}
    assert outcomes["0002-a-7"] == ("ok", None)
    assert "which no folder can have in this locale (ascii); PYTHONUTF8=1" in outcomes["0001-failed"][1]


def test_a_process_ends_with_its_code_and_loses_no_output():
    # A pipe is buffered: what is not flushed is lost.
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (3, "said put away\n"), ended.stderr
