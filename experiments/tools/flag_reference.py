"""Print the reference of every flag of `meshdiff run`, as `docs/flags.md` holds it.

python -m experiments.tools.flag_reference > docs/flags.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap

from meshdiff.cli.config import Config
from meshdiff.diffusion.request import Request
from meshdiff.integrations.diffusers_model import DiffusersRequest
from meshdiff.models import RandomShape, WanRequest

TITLES = {
    Config: "The run",
    RandomShape: "The model, with --model random",
    Request: "The clip",
    WanRequest: "The clip, with --model wan",
    DiffusersRequest: "The clip, or image, with --model diffusers",
}


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


def reference() -> str:
    """A table for each class of flags."""
    lines = [
        "# Flags of experiments/run.py and meshdiff run",
        "",
        "Written by `experiments/tools/flag_reference.py` from the code.",
    ]
    for config, title in TITLES.items():
        lines += ["", f"## {title}", "", "| flag | default | |", "|---|---|---|"]
        texts = explanations(config)
        for field in dataclasses.fields(config):
            if field.name in texts:  # the request has a table of its own
                default = "" if field.default in (None, "") else f"`{field.default}`"
                text = texts[field.name].replace("|", "\\|")
                lines.append(f"| `--{field.name.replace('_', '-')}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
