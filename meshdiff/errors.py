"""Errors in what a user gave to the program, as distinct from faults of the program itself."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(Exception):
    """Input that cannot work: one line that names what was given and what to do about it.

    Args:
        source: the flag, file or argument that is wrong, as a person would type it.
        problem: what is wrong with it and what would fit.
    """

    everywhere = False
    """True if every rank raises it, so that the first rank can print it for all."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:  # travels between ranks
        return type(self), (self.source, self.problem)
