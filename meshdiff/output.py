"""The folder of a run: it appears when it is complete, and not before."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshdiff.errors import InputError

__all__ = ["output_folder"]


@contextmanager
def output_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the body ends well and vanishes when it does not.

    Until then it is a hidden neighbour of `path`, so a killed run leaves
    nothing that looks complete.

    Args:
        path: the folder to be; its parents are made.
        overwrite: replace what is there.

    Raises:
        InputError: if `path` holds files already, or cannot be written.
    """
    path = Path(os.path.abspath(path))
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        what = "is a file" if path.is_file() else "already holds files"
        raise InputError(
            "--out", f"{path} {what}; name another folder{'' if path.is_file() else ' or add --overwrite'}"
        )
    token = uuid.uuid4().hex[:8]
    partial = path.with_name(f".{path.name}.partial-{token}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError("--out", f"{path} cannot be written ({error.strerror})") from error
    try:
        yield partial
        if path.exists():
            old = path.with_name(f".{path.name}.old-{token}")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
