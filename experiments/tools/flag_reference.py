"""Print the reference of every flag of `meshdiff run`, as `docs/flags.md` holds it.

python -m experiments.tools.flag_reference > docs/flags.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from meshdiff.cli.config import Config
from meshdiff.cli.registry import MODELS
from meshdiff.diffusion.request import Request
from meshdiff.models import RandomShape


def explanations(config: type) -> dict[str, str]:
    """The docstring below each field, in the class and in those it extends."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def rows(config: type, defaults: dict[str, list[Any]] | None = None) -> list[str]:
    """A line of a table for each field; with the defaults of several models, where they are given."""
    texts, lines = explanations(config), []
    for field in dataclasses.fields(config):
        if field.name in texts and field.name not in ("request", "options"):  # they have tables of their own
            values = [field.default] if defaults is None else defaults[field.name]
            columns = " | ".join(
                "" if value in (None, "", (), dataclasses.MISSING) else f"`{value}`" for value in values
            )
            text = texts[field.name].replace("|", "\\|")
            lines.append(f"| `--{field.name.replace('_', '-')}` | {columns} | {text} |")
    return lines


def reference() -> str:
    """A table for each class of flags."""
    lines = ["# Flags of experiments/run.py and meshdiff run", "", "Written by `experiments/tools/flag_reference.py`."]
    lines += ["", "## The run", "", "| flag | default | |", "|---|---|---|", *rows(Config)]
    lines += ["", "## The model, with --model random", "", "| flag | default | |", "|---|---|---|", *rows(RandomShape)]
    requests = {name: entry.defaults() for name, entry in MODELS.items() if name != "random"}
    names = [field.name for field in dataclasses.fields(Request)]
    defaults = {name: [getattr(request, name) for request in requests.values()] for name in names}
    lines += ["", "## The clip", "", "Defaults are those of the model; what is empty is chosen by the model, or empty."]
    lines += ["", f"| flag | {' | '.join(requests)} | |", f"|{'---|' * (len(requests) + 2)}", *rows(Request, defaults)]
    for name, request in requests.items():
        if dataclasses.fields(request.options):
            title = f"## The clip, with --model {name} only"
            lines += ["", title, "", "| flag | default | |", "|---|---|---|", *rows(type(request.options))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
