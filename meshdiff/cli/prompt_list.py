"""The list of `--prompts`, read from a file or standard input for every rank."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from meshdiff.cli.config import Config
from meshdiff.cli.request_list import decode_list
from meshdiff.distributed.consensus import after_first_rank, all_gather_object
from meshdiff.distributed.world import recall, remember
from meshdiff.errors import InputError


def read_list(config: Config, first: bool) -> str:
    """The text of `--prompts`, on every rank; only the first reads standard input, which the others do not have.

    Raises:
        InputError: if there is no such list, nothing in it, or it is not UTF-8.
    """
    text, error = "", None
    name = "standard input" if config.prompts == "-" else config.prompts or ""
    try:
        if config.prompts != "-":
            text = decode_list(Path(name).read_bytes(), name)
        elif first:
            earlier = recall("list")  # before a restart by torchrun, which cannot give standard input again
            text = decode_list(sys.stdin.buffer.read(), name) if earlier is None else earlier
            remember("list", text)
    except InputError as raised:
        error = raised
    except OSError as raised:
        error = InputError("--prompts", f"{name} cannot be read ({raised.strerror or raised})")
    if config.prompts == "-":
        after_first_rank("list")  # somebody may be typing, for longer than any time-out
        text, error = all_gather_object((text, error))[0]
    if error is not None:
        raise error
    if not text.strip():
        raise InputError("--prompts", f"{name} holds no request; write a prompt on each line")
    return text


@contextlib.contextmanager
def list_for_ranks(config: Config, text: str | None) -> Iterator[list[str]]:
    """Flags for ranks that are about to be started, which name a file with the list read from standard input."""
    if config.prompts != "-" or text is None:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard-input"
        path.write_text(text, encoding="utf-8", newline="")
        yield ["--prompts", str(path)]
