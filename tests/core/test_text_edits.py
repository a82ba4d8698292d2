"""Edits of a text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from attacks_kit import levenshtein
from codefend.core.text_edits import Edit, lookalikes, rewordings, rewrite, typos


def test_rewrite_applies_edits_from_the_right() -> None:
    edits = [Edit(0, 2, ("b", "a")), Edit(3, 1, ()), Edit(4, 1, ("e", "x"))]
    assert rewrite("abcde", edits) == [*"bac", "e", "x"]
    assert not Edit(0, 2, ()).disjoint(Edit(1, 1, ()))
    assert Edit(0, 1, ()).disjoint(Edit(1, 1, ()))
    assert not Edit(1, 1, ()).disjoint(Edit(1, 1, ("x",)))


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=12))
def test_a_typo_is_one_edit(text: str) -> None:
    for edit in typos(list(text)):
        changed = "".join(rewrite(list(text), [edit]))
        assert changed != text
        assert levenshtein(changed, text) <= (2 if edit.length == 2 else 1)


def test_lookalikes_change_letters_that_still_read_the_same() -> None:
    word = "Is a7?"
    menu = ["".join(rewrite(list(word), [edit])) for edit in lookalikes(list(word))]
    assert {"Ís a7?", "Is á7?", "Is а7?"} <= set(menu)  # the last: a Cyrillic a
    assert len(menu) == len(set(menu)) > 20
    assert all(len(m) == len(word) and m[2] == " " and m.endswith("7?") for m in menu)
    assert all(sum(a != b for a, b in zip(m, word, strict=True)) == 1 for m in menu)


def test_rewordings_keep_most_words() -> None:
    words = ["How", "many", "red", "objects", "are", "there?"]
    menu = [" ".join(rewrite(words, [edit])) for edit in rewordings(words)]
    assert "How many red things are there?" in menu
    assert "How many objects red are there?" in menu
    assert "How many red objects there?" in menu
    assert all(sum(w in m for w in ("many", "red")) == 2 or "numerous" in m for m in menu)
