"""Numbers in sentences."""

from __future__ import annotations

import pytest

from internvit_cli.runtime.words import counted, counted_of


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1_234_567, "1,234,567 images"), (-1, "-1 images")],
)
def test_a_count_has_its_noun_in_the_right_number(count: int, text: str) -> None:
    assert counted(count, "image") == text


def test_a_plural_that_is_not_the_noun_with_an_s_is_given() -> None:
    assert counted(1, "entry", "entries") == "1 entry"
    assert counted(2, "entry", "entries") == "2 entries"


def test_the_noun_of_a_part_goes_by_the_whole() -> None:
    assert counted_of(0, 1, "image") == "0 of 1 image"
    assert counted_of(1, 2_000, "image") == "1 of 2,000 images"
