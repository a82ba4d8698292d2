"""The bitmap font."""

from __future__ import annotations

from codefend.attacks.bitmap_font import render


def test_letters_are_rendered_as_dots() -> None:
    art = ["".join(" #"[int(dot)] for dot in row[1:6]) for row in render("t", 9)[1:8].tolist()]
    assert art == ["#####"] + ["  #  "] * 6
    assert render("ab cd", 2).shape == (17, 13)  # two lines of two
    assert render("~", 3).sum() == 0
