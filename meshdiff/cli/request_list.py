"""Lists of requests: a prompt a line, or a JSON object a line, each with a name that its folder takes."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import re
import sys
import typing
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, Literal

from meshdiff.diffusion.request import Request
from meshdiff.errors import InputError

__all__ = ["Entry", "decode_list", "read_requests"]

LONGEST_NAME = 100


@dataclass(frozen=True)
class Entry:
    """A line of a list.

    Attributes:
        line: its number, from 1.
        name: the folder of its clip, unlike that of any other line.
        request: the request of that line; None if it cannot be read.
        error: the reason why it cannot be read; None if it can.
    """

    line: int
    name: str
    request: Request | None = None
    error: str | None = None


def decode_list(data: bytes, source: str) -> str:
    """The text of a list.

    Args:
        data: the bytes of the list.
        source: the file's name, for errors.

    Raises:
        InputError: if it is not UTF-8. The full list is refused, as letters of its other lines may be wrong as well.
    """
    wide = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
    if data.startswith(wide) or 4 * data.count(0) > len(data):  # every other byte of English without a mark is 0
        longest = data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or 2 * data.count(0) > len(data)
        raise _not_utf8(source, "", "UTF-32" if longest else "UTF-16")
    if _has_wide_lines(data):
        raise _not_utf8(source, "", "UTF-16")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len(re.split(rb"\r\n|\r|\n", data[: error.start]))
        raise _not_utf8(source, f" in line {line}", "LATIN1") from error


def _has_wide_lines(data: bytes) -> bool:
    """True if every line ends with two bytes, as in UTF-16 without a mark, also of letters that have no zeros."""
    ends = [place for place, byte in enumerate(data) if byte == ord("\n")]
    little = all(place % 2 == 0 and data[place + 1 : place + 2] == b"\0" for place in ends)
    big = all(place % 2 == 1 and data[place - 1] == 0 for place in ends)
    return len(data) % 2 == 0 and bool(ends) and (little or big)


def _not_utf8(source: str, where: str, encoding: str) -> InputError:
    """The error for a list that is not UTF-8; `encoding` is a guess, for the command in the message."""
    return InputError(
        "--prompts", f"{source} is not UTF-8{where}; save it as UTF-8, or convert it: iconv -f {encoding} -t UTF-8"
    )


def read_requests(text: str, base: Request) -> list[Entry]:
    """The entries of a list, good and bad; blank lines are none.

    A line that starts with `{` is a JSON object with any of the fields of
    `base`, and `name`; any other line is a prompt. Fields that a line leaves out
    are those of `base`.

    Args:
        text: the list.
        base: the request that lines change; its class, and that of its options, define the fields.
    """
    entries: list[Entry] = []
    taken: dict[str, int] = {}
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if not line.strip():
            continue
        fallback = f"{number:04d}"
        try:
            name, request = _read(line.strip(), base, fallback)
            if name.casefold() in taken:
                raise InputError("name", f"{name!r} is the name of line {taken[name.casefold()]} as well")
        except InputError as error:
            entries.append(Entry(number, f"{fallback}-failed", error=str(error)))
        else:
            taken[name.casefold()] = number
            entries.append(Entry(number, name, request))
    return entries


def _read(line: str, base: Request, number: str) -> tuple[str, Request]:
    if not line.startswith("{"):
        return f"{number}-{_slug(line)}", replace(base, prompt=line)
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError("line", f"starts as a JSON object but is none ({error})") from error
    name = given.pop("name", None)
    more = given.pop("options", {})
    if not isinstance(more, dict):
        raise InputError("options", f"{more!r} given, needs an object with the pipeline's options by name")
    hints = typing.get_type_hints(type(base)) | typing.get_type_hints(type(base.options))
    # A list is of options that `options` has by name.
    all_options = [field.name for field in dataclasses.fields(base.options)]
    options = [name for name in all_options if typing.get_origin(hints[name]) is not tuple]
    fields = [*(field.name for field in dataclasses.fields(base) if field.name != "options"), *options]
    for key, value in given.items():
        if key not in fields:
            known = ["name", *fields, *(["options"] if options != all_options else [])]
            raise InputError("line", f"unknown field {key!r}; known: {', '.join(known)}")
        if not _accepts(hints[key], value):
            raise InputError(key, f"{value!r} given, needs {_described(hints[key])}")
    of_model = {key: given.pop(key) for key in options if key in given}
    of_request = replace(base.options, **of_model)
    request = replace(base, **given, options=of_request.updated(more) if more else of_request)
    return (f"{number}-{_slug(request.prompt)}" if name is None else _checked_name(name)), request


def _accepts(hint: Any, value: Any) -> bool:
    """True if a field's annotation allows a value that was read from JSON."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return any(_accepts(one, value) for one in typing.get_args(hint))
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return " or ".join(_described(one) for one in typing.get_args(hint))
    return {str: "text", int: "a whole number", float: "a number", type(None): "null"}[hint]


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w .+-]*", name) or len(name.encode()) > LONGEST_NAME:
        raise InputError(
            "name",
            f"{name!r} given; a name is a folder's: letters, digits, space and _ . + -, not first a sign, "
            f"{LONGEST_NAME} bytes at most",
        )
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise InputError(
            "name",
            f"{name!r} given, which no folder can have in this locale ({sys.getfilesystemencoding()}); PYTHONUTF8=1 in "
            "the environment allows it",
        ) from error
    return name.rstrip(" .")


def _slug(prompt: str) -> str:
    """The beginning of a prompt as part of a folder's name."""
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-") or "clip"
