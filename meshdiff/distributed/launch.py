"""Starting ranks from a single process, with the launcher that torchrun itself uses."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import ctypes
import io
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meshdiff.distributed.torch_compat import known

__all__ = ["end_process", "end_with_launcher", "end_with_parent", "print_any_letter", "report_failure", "start_ranks"]

_LAUNCHER = "MESHDIFF_LAUNCHER"  # in a rank's environment: the process that started it


def start_ranks(ranks: int, command: Sequence[str]) -> int:
    """Run `python command` as that many ranks on this machine, and wait.

    Signals sent to this process end the ranks.

    Args:
        ranks: number of processes to start.
        command: a script, or `-m` and a module, and its arguments.

    Returns:
        0, or the exit code of the first rank that failed; 128 + N for signal N.
    """
    os.environ[_LAUNCHER] = str(os.getpid())
    # torchrun's default as well: without it every rank would use every core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a lost store is pages of C++ frames above a rank's line
    # Its report of a failed rank is a page of traceback below the rank's own message.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
                **known(LaunchConfig, shutdown_timeout=10),
            )
            elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        said: Any = first.message
        report_failure(said.get("message", "") if isinstance(said, dict) else said)
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException as caught:
        return 128 + int(caught.sigval)
    except KeyboardInterrupt:
        return 130
    return 0


def end_with_launcher() -> None:
    """Let a rank of `start_ranks` end when the launcher is killed and can no longer end its ranks (Linux only)."""
    if os.environ.get(_LAUNCHER) == str(os.getppid()):
        end_with_parent()


def end_with_parent() -> None:
    """Let this process get SIGTERM when the process that started it has ended for any reason (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def print_any_letter() -> None:
    """Let this process print letters that its locale cannot encode as escapes, where Python would raise."""
    codecs.register_error("meshdiff.any_letter", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="meshdiff.any_letter")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)  # bytes of a path, as they were given
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def report_failure(line: str) -> None:
    """Let torchrun's report of this rank show that line as the reason; does nothing without torchrun.

    The line is written in the form that `torch.distributed.elastic.multiprocessing.errors.record`
    gives to an exception, without its traceback.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):  # the report is a courtesy
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def end_process(code: int) -> NoReturn:
    """End this rank with exactly this exit code.

    A plain exit shuts the interpreter down while gloo's threads may still hold
    a tensor of the last collective; releasing it then aborts the process, on
    about one exit in ten. So the functions registered with `atexit` are run,
    the streams are flushed, and the process ends without further cleanup.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
