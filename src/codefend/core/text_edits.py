"""Small text edits that preserve the meaning for a reader: typos, look-alike letters, rewordings.

Text attacks search these edits; the prompt generator is trained to undo them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """``length`` units from ``start`` on are replaced with ``by``; units are characters or words."""

    start: int
    length: int
    by: tuple[str, ...]

    def disjoint(self, other: Edit) -> bool:
        """Whether both can be applied in either order: they touch different units and start at different ones."""
        first, second = sorted((self, other), key=lambda edit: edit.start)
        return first.start != second.start and first.start + first.length <= second.start


def rewrite(units: Sequence[str], edits: Sequence[Edit]) -> list[str]:
    """Apply pairwise `disjoint` edits to ``units``, from the last to the first so that positions stay valid."""
    changed = list(units)
    for edit in sorted(edits, key=lambda e: e.start, reverse=True):
        changed[edit.start : edit.start + edit.length] = edit.by
    return changed


_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours(letter: str) -> str:
    """Adjacent keys of ``letter`` on a QWERTY keyboard, in its case; "" for other characters."""
    for number, row in enumerate(_ROWS):
        at = row.find(letter.lower())
        if at < 0:
            continue
        same_row = row[max(at - 1, 0) : at] + row[at + 1 : at + 2]
        above = _ROWS[number - 1][at : at + 2] if number else ""
        below = _ROWS[number + 1][max(at - 1, 0) : at + 1] if number + 1 < len(_ROWS) else ""
        near = same_row + above + below
        return near.upper() if letter.isupper() else near
    return ""


def typos(characters: Sequence[str]) -> list[Edit]:
    """Every swap, deletion, doubling, slip (a neighbouring key instead) and insertion of a neighbouring key."""
    edits = []
    for i, letter in enumerate(characters):
        if not letter.isalpha():
            continue
        if i + 1 < len(characters) and characters[i + 1].isalpha() and characters[i + 1] != letter:
            edits.append(Edit(i, 2, (characters[i + 1], letter)))
        edits += [Edit(i, 1, ()), Edit(i, 1, (letter, letter))]
        for near in _neighbours(letter):
            edits += [Edit(i, 1, (near,)), Edit(i, 1, (letter, near))]
    return edits


# Cyrillic letters that print like Latin ones.
_TWINS = dict(zip("acehijopsxyABCEHKMOPTX", "асеһіјорѕхуАВСЕНКМОРТХ", strict=True))
_ACCENTED = tuple(chr(code) for code in range(0xC0, 0x250) if len(unicodedata.normalize("NFD", chr(code))) == 2)


def lookalikes(characters: Sequence[str]) -> list[Edit]:
    """Every replacement of a letter with one that looks alike: with an accent, or from another alphabet."""
    edits = []
    for i, letter in enumerate(characters):
        alike = [other for other in _ACCENTED if unicodedata.normalize("NFD", other)[0] == letter]
        edits += [Edit(i, 1, (other,)) for other in (*alike, *_TWINS.get(letter, ""))]
    return edits


# Words that can be deleted or replaced without changing the question.
_SPARE = frozenset(
    ("a", "an", "the", "of", "is", "are", "there", "do", "does", "please", "in", "on", "this", "that", "it")
)
_SYNONYMS = {
    "picture": ("image", "photo", "scene"),
    "image": ("picture", "photo", "scene"),
    "photo": ("picture", "image"),
    "color": ("colour", "hue"),
    "colour": ("color", "hue"),
    "describe": ("explain", "depict", "summarize"),
    "object": ("thing", "item"),
    "objects": ("things", "items"),
    "what": ("which",),
    "which": ("what",),
    "many": ("numerous",),
    "see": ("spot", "notice"),
    "shown": ("displayed", "visible"),
    "left": ("left-hand",),
    "right": ("right-hand",),
    "big": ("large",),
    "large": ("big",),
    "small": ("little", "tiny"),
}


def rewordings(words: Sequence[str]) -> list[Edit]:
    """Every swap of neighbours, repetition, deletion of a spare word and replacement with a synonym."""
    edits = []
    for i, word in enumerate(words):
        bare = word.strip(".,?!").lower()
        if not bare:
            continue
        if i + 1 < len(words) and words[i + 1] != word:
            edits.append(Edit(i, 2, (words[i + 1], word)))
        edits.append(Edit(i, 1, (word, word)))
        if bare in _SPARE and len(words) > 1:
            edits.append(Edit(i, 1, ()))
        for other in _SYNONYMS.get(bare, ()):
            tail = word[len(word.rstrip(".,?!")) :]
            edits.append(Edit(i, 1, ((other.capitalize() if word[0].isupper() else other) + tail,)))
    return edits
