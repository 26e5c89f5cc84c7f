from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdiff import InputError, Request
from meshdiff.cli.request_list import LONGEST_NAME, decode_list, read_requests
from meshdiff.models import DigitsModel, WanModel

BASE = replace(DigitsModel.DEFAULTS, steps=2, seed=5)


def test_prompts_and_objects_become_requests():
    text = (
        "a 7 moving left\n\n" + json.dumps({"prompt": "a 3", "seed": 9, "guidance_scale": 2, "name": "three"}) + "\r\n"
    )
    first, second = read_requests(text, BASE)
    assert (first.line, first.name, first.error) == (1, "0001-a-7-moving-left", None)
    assert first.request == BASE
    assert (second.line, second.name) == (3, "three")
    assert second.request == replace(BASE, prompt="a 3", seed=9, guidance_scale=2)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_named_with_the_command_that_helps(encoding):
    guess = encoding[:6].upper()
    command = re.escape(f"iconv -f {guess} -t UTF-8")
    with pytest.raises(InputError, match=f"--prompts: list.txt is not UTF-8; .*{command}$"):
        decode_list("a 7 moving left\na 3".encode(encoding), "list.txt")
    if "16" in encoding:  # of letters without a byte that is 0
        with pytest.raises(InputError, match=f"--prompts: list.txt is not UTF-8; .*{command}$"):
            decode_list("\u732b\u732b\u732b\u732b\n\u732b\u732b\u732b\u732b".encode(encoding), "list.txt")


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_the_first_line_that_is_not_utf8_is_named(ends):
    data = f"\ufeffa 1{ends}\u732b{ends}".encode() + b"un ch\xe2teau"
    with pytest.raises(InputError, match=r"--prompts: list.txt is not UTF-8 in line 3; .*iconv -f LATIN1 -t UTF-8$"):
        decode_list(data, "list.txt")


def test_utf8_is_read_with_and_without_a_mark_and_one_bad_character_is_not_a_bad_list():
    assert decode_list("\ufeff\u732b\n".encode(), "list.txt") == "\u732b\n"
    assert decode_list(b"", "list.txt") == ""
    assert decode_list(b"a 7\0\n", "list.txt") == "a 7\0\n"


def test_bytes_of_another_encoding_on_the_command_line_say_how_to_read_them():
    with pytest.raises(InputError, match=r"--prompt: is not in this locale's encoding .*; PYTHONUTF8=1"):
        Request("caf\udcc3\udca9")


def test_lines_end_as_on_any_system():
    assert [entry.line for entry in read_requests("a 1\r\na 2\ra 3\n\ra 4", BASE)] == [1, 2, 3, 5]


def test_fields_are_those_of_the_model():
    (entry,) = read_requests('{"guidance_scale_2": null, "shift": 5, "solver": "unipc"}', WanModel.DEFAULTS)
    assert entry.request == replace(WanModel.DEFAULTS, shift=5)
    (entry,) = read_requests("猫\u3000在草地上 \U0001f408", WanModel.DEFAULTS)
    assert entry.request == replace(WanModel.DEFAULTS, prompt="猫\u3000在草地上 \U0001f408")
    (entry,) = read_requests('{"guidance_scale_2": 2.0}', BASE)
    assert entry.error is not None
    assert entry.error.startswith("line: unknown field 'guidance_scale_2'; known: name, prompt, ")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "line: starts as a JSON object but is none"),
        ('{"steps": 2} x', "line: starts as a JSON object but is none"),
        ('{"stepz": 2}', "line: unknown field 'stepz'; known: name, prompt, negative_prompt, frames"),
        ('{"steps": "2"}', "steps: '2' given, needs a whole number"),
        ('{"steps": 2.5}', "steps: 2.5 given, needs a whole number"),
        ('{"steps": true}', "steps: True given, needs a whole number"),
        ('{"steps": 1e30}', "steps: 1e+30 given, needs a whole number"),
        ('{"steps": 1000000000}', "--steps: 1000000000 given, needs 100000 at most"),
        ('{"steps": 0}', "--steps: 0 given, needs at least 1"),
        ('{"guidance_scale": NaN}', "--guidance-scale: nan given"),
        ('{"prompt": null}', "prompt: None given, needs text"),
        ('{"prompt": ""}', "--prompt: is empty"),
        ('{"prompt": "\\ud800"}', "--prompt: "),
        ("a 7\0", "--prompt: "),
        ('{"name": "../x"}', "name: '../x' given; a name is a folder's"),
        ('{"name": ".hidden"}', "name: "),
        ('{"name": ""}', "name: "),
        ('{"name": 3}', "name: "),
        (json.dumps({"name": "x" * 101}), "name: "),
    ],
)
def test_bad_lines_say_why_and_leave_the_others_alone(line, error):
    bad, good = read_requests(f"{line}\na 5", BASE)
    assert bad.request is None
    assert bad.error.startswith(error)
    assert "\n" not in bad.error
    assert good.request == replace(BASE, prompt="a 5")


def test_two_lines_of_one_name_are_one_folder_too_few():
    one, other = read_requests('{"name": "A"}\n{"name": "a"}', BASE)
    assert one.error is None
    assert other.error == "name: 'a' is the name of line 1 as well"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(
    ["prompt", "negative_prompt", "seed", "frames", "steps", "guidance_scale", "name", "solver", "x"]
)
objects = st.dictionaries(keys, values, max_size=4).map(json.dumps)
lines = objects | st.text(max_size=30) | objects.map(lambda line: line[:-1]) | st.sampled_from(["{" * 5000, "[1]", '"'])


@given(st.lists(lines, max_size=6).map("\n".join))
def test_any_list_is_read(text):
    entries = read_requests(text, BASE)
    names = [entry.name.casefold() for entry in entries if entry.request]
    assert len(set(names)) == len(names)
    for entry in entries:
        assert (entry.request is None) != (entry.error is None)
        assert "\n" not in (entry.error or "")
        assert 0 < len(entry.name.encode()) <= LONGEST_NAME
        assert not {"/", "\0"} & set(entry.name)
        assert not entry.name.startswith(".")
