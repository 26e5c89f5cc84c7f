"""The prompts that the embedded model understands: "a 7 moving left slowly"."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from meshdiff.errors import InputError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
"""Direction of motion as (column, row) steps; rows grow downwards."""
SPEEDS = ("slowly", "steadily", "quickly")

# A prompt becomes three words: a digit, a direction and a speed. A word that is not
# given is the `ABSENT` word of its place, which training shows the model as well, so
# that an empty prompt, or half a prompt, is something it knows.
TEXT_LENGTH = 3
_FIRST_DIRECTION = len(DIGITS) + 1
_FIRST_SPEED = _FIRST_DIRECTION + len(DIRECTIONS) + 1
VOCABULARY = _FIRST_SPEED + len(SPEEDS) + 1


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt; `None` for each word that it does not have."""

    digit: int | None = None
    direction: str | None = None
    speed: str | None = None

    def words(self) -> list[int]:
        """The numbers of its three words, in `range(VOCABULARY)`."""
        directions = list(DIRECTIONS)
        return [
            0 if self.digit is None else 1 + self.digit,
            _FIRST_DIRECTION + (0 if self.direction is None else 1 + directions.index(self.direction)),
            _FIRST_SPEED + (0 if self.speed is None else 1 + SPEEDS.index(self.speed)),
        ]


_SPELLINGS = {
    **{str(number): ("digit", number) for number in range(10)},
    **{name: ("digit", number) for number, name in enumerate(DIGITS)},
    **{word: ("direction", word) for word in ("left", "right", "up", "down")},
    **{word: ("speed", word) for word in SPEEDS},
}
_FILLERS = frozenset(["a", "an", "the", "digit", "number", "moving", "moves", "going", "goes", "and", "to", "is"])


def parse_prompt(text: str, flag: str = "--prompt") -> Prompt:
    """Read a prompt such as "a 7 moving left", "the nine goes up and right quickly" or "three".

    Raises:
        InputError: for a word that is not in the vocabulary, or more than one digit,
            speed or direction (two that make a diagonal are one direction).
    """
    found: dict[str, list[object]] = {"digit": [], "direction": [], "speed": []}
    for word in re.findall(r"[^\s,.!-]+", text.lower()):
        if word in _SPELLINGS:
            kind, value = _SPELLINGS[word]
            found[kind].append(value)
        elif word not in _FILLERS:
            close = difflib.get_close_matches(word, _SPELLINGS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise InputError(
                flag,
                f"unknown word {word!r}{hint}; try 'a DIGIT moving DIRECTION [SPEED]': digits 0 to 9 or their names; "
                f"directions {', '.join(DIRECTIONS)}; speeds {', '.join(SPEEDS)}",
            )
    for kind in ("digit", "speed"):
        if len(set(found[kind])) > 1:
            raise InputError(flag, f"more than one {kind}: {', '.join(map(str, found[kind]))}; this model takes one")
    direction = _direction(found["direction"])
    if found["direction"] and direction is None:
        raise InputError(
            flag, f"no direction is {' and '.join(found['direction'])}; directions: {', '.join(DIRECTIONS)}"
        )
    return Prompt(next(iter(found["digit"]), None), direction, next(iter(found["speed"]), None))


def _direction(words: list[str]) -> str | None:
    """The direction that one or two distinct words name, if they name one."""
    vertical_first = "-".join(sorted(set(words), key=("up", "down", "left", "right").index))
    return vertical_first if vertical_first in DIRECTIONS else None
