"""`meshdiff run`: read the flags, agree with the other ranks, start more of them if need be, and run."""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
from datetime import timedelta

import torch
import tyro
from torch.distributed.elastic.multiprocessing.errors import record

from meshdiff.cli.config import Config
from meshdiff.cli.generate import make_clip, make_clips
from meshdiff.cli.prompt_list import list_for_ranks, read_list
from meshdiff.cli.registry import MODELS, ModelEntry
from meshdiff.cli.request_list import read_requests
from meshdiff.distributed.consensus import agreed, check_same, is_first_rank
from meshdiff.distributed.failures import ended_by, ended_by_signal
from meshdiff.distributed.heartbeat import Heartbeats
from meshdiff.distributed.launch import end_with_launcher, start_ranks
from meshdiff.distributed.mesh import check_gpus, torchrun_command
from meshdiff.distributed.world import init_distributed, launched_world_size
from meshdiff.errors import InputError
from meshdiff.pipeline import check_strategy, prepare_request

COMMAND = ("-P", "-m", "meshdiff", "run")
"""Arguments of `python` for ranks that this process starts; with -P, files of the working folder are not imported."""


def parse(arguments: list[str]) -> Config:
    """Read the flags; a parse error becomes an `InputError`, so that `agreed` can raise it on all ranks."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            config = tyro.cli(Config, prog="meshdiff run", args=arguments, default=_defaults(arguments))
    except SystemExit as stop:
        if not stop.code:
            raise HelpAsked("--help", printed.getvalue().rstrip()) from None
        raise ParseError("flags", printed.getvalue().rstrip()) from None
    config.check()
    return config


def _defaults(arguments: list[str]) -> Config:
    """The default flags, with the named model's default request, so that the help shows it."""
    entry = _peek_entry(arguments)
    return Config() if entry is None else Config(request=entry.defaults())


def _peek_entry(arguments: list[str]) -> ModelEntry | None:
    """The model that is named, or None if there is no such model."""
    return {str(name): entry for name, entry in MODELS.items()}.get(peek("--model", arguments) or Config.model)


def peek(flag: str, arguments: list[str]) -> str | None:
    """The value of a flag that has to be known before the others are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, nargs="?", dest="value")
    return parser.parse_known_args(arguments)[0].value


def timeout(arguments: list[str]) -> timedelta:
    """The time to wait for other ranks, read before the ranks have agreed on the flags."""
    given = peek("--timeout", arguments) or ""
    entry = _peek_entry(arguments)
    slow = torch.cuda.is_available() or (entry is not None and entry.checkpoint is not None)
    return timedelta(seconds=int(given) if given.isdecimal() and int(given) else 600 if slow else 60)


class ParseError(InputError):
    """Tyro's own message about flags that it cannot read."""

    exit_code = 2

    def __str__(self) -> str:
        return self.problem


class HelpAsked(ParseError):
    """The help text of the flags; not an error."""

    exit_code = 0


def main(arguments: list[str]) -> int:
    """Parse, agree with the other ranks, start more of them if need be, run; returns the exit code."""
    heartbeats, failed = Heartbeats(), False
    try:
        world = launched_world_size()
        if world > 1:
            init_distributed(timeout(arguments))
            heartbeats.start()
        with agreed():
            config = parse(arguments)
        check_same(config.flags())
        torch.set_num_threads(config.threads)
        with agreed():
            text = None if config.prompts is None else read_list(config, is_first_rank())
            entries = None if text is None else read_requests(text, config.request)
            requests = 1 if entries is None else max(1, sum(entry.request is not None for entry in entries))
            model = config.open_model()
            layout = config.layout(model, world, requests)
            if config.simulate and layout.dp > 1:
                raise InputError(
                    "--dp", "one process cannot simulate replicas, which do different things; leave it out"
                )
        if world == 1 and layout.world_size > 1 and not config.simulate:
            check_strategy(model, layout, config.strategy)
            if entries is None:
                prepare_request(model, config.request, layout)
            if config.device_type == "cuda":
                check_gpus(layout.world_size)
            print(
                f"starting {layout.world_size} ranks on this machine, as would: {torchrun_command(layout)}", flush=True
            )
            with list_for_ranks(config, text) as changed:
                return start_ranks(layout.world_size, [*COMMAND, *arguments, *changed])
        if entries is None:
            make_clip(config, layout, model)
        else:
            return make_clips(config, layout, model, entries)
    except Exception as error:
        failed = True
        code = ended_by(error, heartbeats)
        if code is None:
            raise
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:  # from a signal
        failed = True
        return ended_by_signal(int(stop.code or 0), heartbeats)
    finally:
        heartbeats.stop()
        # Of several ranks that failed, one might wait here for another; the process is about to end anyway.
        if torch.distributed.is_initialized() and not (failed and torch.distributed.get_world_size() > 1):
            torch.distributed.destroy_process_group()
    return 0


def command(arguments: list[str]) -> int:
    """Run `main` as the work of this process, with signals set up; returns the exit code."""
    # An exit that unwinds, so that nothing half-written stays behind.
    for stop in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, lambda number, frame: sys.exit(128 + number))
    end_with_launcher()
    exit_code = record(main)(arguments) or 0
    # The first rank to end with an error makes torchrun end the others, whose exit codes are to say the same.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return exit_code
