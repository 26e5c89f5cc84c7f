"""The number of cases that tests draw."""

from __future__ import annotations

TIMES = 1
"""Of the command line's --draws."""


def times(cases: int) -> int:
    """The number of cases for a test that draws that many by default."""
    return cases * TIMES
