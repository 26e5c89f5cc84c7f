"""A module and all that it holds, at one time."""
