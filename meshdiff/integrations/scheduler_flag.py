"""The scheduler that `--scheduler` names, made of the configuration of the pipeline's own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from meshdiff.errors import InputError
from meshdiff.integrations.call_options import Unfit, described, from_text, hints_of

__all__ = ["make_scheduler"]


def make_scheduler(text: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A scheduler of diffusers with the settings of another one, where it has them too.

    Args:
        text: `NAME`, or `NAME:SETTING=VALUE,SETTING=VALUE`; a class of diffusers and parameters of its constructor.
        config: the configuration of the other one.

    Raises:
        InputError: if there is no such scheduler, setting or value, or they do not go together.
    """
    name, _, settings = text.partition(":")
    flag = f"--scheduler {text}"
    known = [one for one in dir(diffusers) if one.endswith("Scheduler") and not one.startswith("Flax")]
    kind: Any = getattr(diffusers, name, None) if name in known else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        near = difflib.get_close_matches(name, known, 3, 0.4) or ["UniPCMultistepScheduler"]
        problem = f"{name} is no scheduler of diffusers {diffusers.__version__}; the nearest are {', '.join(near)}"
        raise InputError(flag, problem)
    parameters = {key: one for key, one in inspect.signature(kind.__init__).parameters.items() if key != "self"}
    hints, given = hints_of(kind.__init__, parameters), {}
    for setting in filter(None, settings.split(",")):
        key, sign, value = setting.partition("=")
        if key not in hints or not sign:
            near = difflib.get_close_matches(key, hints, 3, 0.4) or list(hints)
            raise InputError(
                flag, f"{setting} is no setting of {name}, as NAME=VALUE; the nearest are {', '.join(near)}"
            )
        try:
            given[key] = from_text(value, hints[key], _no_file)
        except Unfit:
            raise InputError(flag, f"{key} is {value!r}, needs {described(hints[key])}") from None
    try:
        return kind.from_config(dict(config), **given)
    except (ValueError, NotImplementedError, TypeError, ImportError) as error:
        raise InputError(flag, f"cannot be made ({' '.join(str(error).split())}); give other settings") from error


def _no_file(name: str) -> Any:
    raise Unfit
