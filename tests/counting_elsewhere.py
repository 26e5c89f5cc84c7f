"""A module that models count in: in its globals, and in an attribute of its class."""

calls = 0


class Settings:
    calls = 0
