"""The command `meshdiff`: `run` makes clips, `sweep` times layouts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import meshdiff
from meshdiff.distributed.launch import end_process, print_any_letter
from meshdiff.distributed.world import keep_order_of_sums

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "run": ("meshdiff.cli.run", "make one clip from a prompt, or many from a list, on one device or on many"),
    "sweep": ("meshdiff.cli.sweep.main", "time layouts side by side on this machine, and draw what comes out"),
}
"""The module of each command, whose `command(arguments)` returns an exit code, and a line about it."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code: 2 for bad input.

    Args:
        arguments: the command's name and its flags; by default those of this process.
    """
    print_any_letter()
    keep_order_of_sums()
    name, *flags = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("--help", "-h"):
        print(_usage())
        end_process(0)
    if name == "--version":
        print(meshdiff.__version__)
        end_process(0)
    if name not in COMMANDS:
        print(f"meshdiff: {name!r} is no command; name one of {', '.join(COMMANDS)}", file=sys.stderr)
        end_process(2)
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if (error.name or "meshdiff").partition(".")[0] == "meshdiff":
            raise
        print(f"meshdiff {name}: needs {error.name}; pip install 'meshdiff[{name}]'", file=sys.stderr)
        end_process(2)
    end_process(module.command(flags))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: meshdiff COMMAND [FLAGS]", "", "commands:"]
    lines += [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    lines += [
        "",
        "meshdiff COMMAND --help shows the flags of a command, meshdiff --version the version.",
        "On many ranks:",
    ]
    return "\n".join([*lines, "  torchrun --nproc-per-node 8 -m meshdiff run --cp 4 --cfg 2"])
