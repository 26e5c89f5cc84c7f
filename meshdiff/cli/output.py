"""The folder of a run: it appears when it is complete, and not before."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from meshdiff.errors import InputError

__all__ = ["COMPLETE", "output_folder", "remove_partial"]


COMPLETE = "metrics.json"
"""The file that makes a folder a run; written last."""


@contextmanager
def output_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the body ends well and vanishes when it does not.

    Until then it is a hidden neighbour of `path`, so a killed run leaves
    nothing that looks complete.

    Args:
        path: the folder to be; its parents are made.
        overwrite: replace an earlier run there; never anything else.

    Raises:
        InputError: if `path` holds files already, or cannot be written.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        _check_free(path, overwrite)
        new_parents = [parent for parent in path.parents if not parent.exists()]
        partial.mkdir(parents=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield partial
        _move(partial, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with _signals_wait():
            shutil.rmtree(partial, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):  # not empty: the run is in it
                    parent.rmdir()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that end this process take effect after the body: torchrun sends one when another rank has failed."""
    waiting: list[int] = []
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in waiting:
            signal.raise_signal(late)


def remove_partial(path: Path) -> None:
    """Remove the hidden folders that killed runs with the output `path` left behind."""
    for leftover in [*path.parent.glob(f".{path.name}.partial-*"), *path.parent.glob(f".{path.name}.old-*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_file():
        raise InputError("--out", f"{path} is a file; name another folder")
    if path.is_dir() and any(path.iterdir()):
        if not (path / COMPLETE).is_file():
            raise InputError("--out", f"{path} holds files that are no run's; name another folder")
        if not overwrite:
            raise InputError("--out", f"{path} holds a run already; name another folder or add --overwrite")


def _move(partial: Path, path: Path) -> None:
    """Put the new folder in the place of the old one, in as short a time as possible."""
    if not path.exists():
        partial.rename(path)
        return
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    path.rename(old)
    partial.rename(path)
    shutil.rmtree(old)


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError("--out", f"{path} cannot be written ({error.strerror or error})")
