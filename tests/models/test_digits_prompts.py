from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdiff import InputError
from meshdiff.models.digits_prompts import DIRECTIONS, SPEEDS, VOCABULARY, Prompt, parse_prompt


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("a 7 moving left", Prompt(7, "left")),
        ("A Seven moving LEFT.", Prompt(7, "left")),
        ("the number nine goes up and right, quickly!", Prompt(9, "up-right", "quickly")),
        ("an 8 moving right-down", Prompt(8, "down-right")),
        ("0 down-left slowly", Prompt(0, "down-left", "slowly")),
        ("three", Prompt(3)),
        ("moving up", Prompt(None, "up")),
        ("", Prompt()),
    ],
)
def test_prompts_are_read(text, prompt):
    assert parse_prompt(text) == prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 7 moving sideways", "--prompt: unknown word 'sideways'"),
        ("a seevn moving left", r"'seevn' \(did you mean 'seven'\?\)"),
        ("a 12 moving left", "unknown word '12'"),
        ("a cat walking on grass", "unknown word 'cat'"),
        ("a 7 and a 3 moving left", "more than one digit: 7, 3"),
        ("a 7 moving left and right", "no direction is left and right"),
        ("a 7 moving slowly quickly", "more than one speed"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(text, message):
    with pytest.raises(InputError, match=message):
        parse_prompt(text)


@given(
    digit=st.none() | st.integers(0, 9),
    direction=st.none() | st.sampled_from(list(DIRECTIONS)),
    speed=st.none() | st.sampled_from(SPEEDS),
)
def test_words_tell_prompts_apart_and_stay_in_the_vocabulary(digit, direction, speed):
    prompt = Prompt(digit, direction, speed)
    text = f"a {'' if digit is None else digit} moving {direction or ''} {speed or ''}"
    assert parse_prompt(text) == prompt
    words = prompt.words()
    assert len(set(words)) == 3
    assert all(0 <= word < VOCABULARY for word in words)
    assert (words == Prompt().words()) == (prompt == Prompt())


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    refused = ""
    try:
        parse_prompt(text)
    except InputError as error:
        refused = str(error)
    assert "\n" not in refused
