"""A module that models count in: in its globals, and in an attribute of its class."""

calls = 0


def count() -> int:
    global calls
    calls += 1
    return calls


class Settings:
    calls = 0
