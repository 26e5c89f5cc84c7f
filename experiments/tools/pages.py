"""Pages of docs/ that several programs write, each its own part."""

from __future__ import annotations

from pathlib import Path

from meshdiff.errors import InputError

__all__ = ["check_page", "put_part"]


def check_page(page: Path | None) -> None:
    """Raise `InputError` for a page that cannot be written, before what is to be written takes its time."""
    try:
        if page is not None:
            page.open("a", encoding="utf-8").close()
    except OSError as error:
        raise InputError("--page", f"{page} cannot be written ({error.strerror}); name a file that can") from error


def put_part(page: Path, text: str) -> None:
    """Write one part of a page in markdown, from its heading to the next one of any level; other parts stay.

    Args:
        page: the file; made if there is none.
        text: the part, whose first line is its heading. One that the page lacks goes to the end.
    """
    heading = text.splitlines()[0]
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    headings = [number for number, line in enumerate(lines) if line.startswith("#")]
    begin = next((number for number in headings if lines[number] == heading), len(lines))
    end = next((number for number in headings if number > begin), len(lines))
    parts = ("\n".join(lines[:begin]), text, "\n".join(lines[end:]))
    page.write_text("\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n", encoding="utf-8")
