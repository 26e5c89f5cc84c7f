"""The pipeline's own check of what it is given, before its parts are loaded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from PIL.Image import Image as Picture

from meshdiff.integrations.call_options import CallOptions, members_of

__all__ = ["early_refusal"]


def early_refusal(pipeline: Any, options: CallOptions, arguments: Mapping[str, Any]) -> ValueError | None:
    """The error of `check_inputs` of a pipeline; None if it finds none, or needs the parts of the pipeline to tell.

    An error counts if it names an image or a video that is missing, or an argument that is given: others may be about
    values that the call would have filled in.

    Args:
        pipeline: its class.
        options: the parameters of its call.
        arguments: of the call.
    """
    check = getattr(pipeline, "check_inputs", None)
    if check is None:
        return None
    parameters = [one for name, one in inspect.signature(check).parameters.items() if name != "self"]
    of_call = {name: value for name, value in options.defaults.items() if value is not inspect.Parameter.empty}
    of_call |= arguments
    given = {one.name: of_call[one.name] for one in parameters if one.name in of_call}
    if any(
        one.default is one.empty and one.name not in given and one.kind is one.POSITIONAL_OR_KEYWORD
        for one in parameters
    ):
        return None
    try:
        check(object.__new__(pipeline), **given)  # which has no parts
    except ValueError as error:
        missing = [
            name for name in options.names if name not in arguments and Picture in members_of(options.hints[name])
        ]
        named = [*missing, *arguments]
        return error if any(re.search(rf"\b{name}\b", str(error)) for name in named if name != "prompt") else None
    except Exception:  # it asks for a part
        return None
    return None
