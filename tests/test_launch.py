from __future__ import annotations

import subprocess
import sys

ENDS = """
import atexit
from meshdiff.launch import end_process
atexit.register(print, "put away")
print("said", end=" ")
end_process(3)
"""


def test_a_process_ends_with_its_code_and_loses_no_output():
    # A pipe is buffered: what is not flushed is lost.
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (3, "said put away\n"), ended.stderr
