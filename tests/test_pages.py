"""Pages of docs/ that several programs write."""

from __future__ import annotations

import pytest

from experiments.tools.pages import check_page, put_part
from meshdiff.errors import InputError


def test_a_part_takes_the_place_of_the_one_before_and_others_stay(tmp_path):
    page = tmp_path / "page.md"
    put_part(page, "# One\n\n| a |\n")
    put_part(page, "## Two\n\nb\n")
    put_part(page, "# One\n\n| c |\n\nd\n")
    assert page.read_text() == "# One\n\n| c |\n\nd\n\n## Two\n\nb\n"
    put_part(page, "## Two\n\ne\n")
    assert page.read_text() == "# One\n\n| c |\n\nd\n\n## Two\n\ne\n"


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    check_page(None)
    check_page(tmp_path / "page.md")
    with pytest.raises(InputError, match=r"--page: .*No such file or directory.*; name a file that can"):
        check_page(tmp_path / "nowhere" / "page.md")
