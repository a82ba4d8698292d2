"""One answer of many: the vote over answers that were given under different noise."""

from __future__ import annotations

import re
from collections.abc import Sequence

SHORT = 3  # words: answers up to this length must agree word for word, longer ones by the words that they share
OVERLAP = 0.5  # Jaccard similarity of the words from which two long answers count as one
_ARTICLES = frozenset({"a", "an", "the"})


def elect(answers: Sequence[str]) -> int:
    """The index of the answer with the most others like it; of equals the one nearest to all, then the first.

    For short answers that is the majority, without case, articles and punctuation. Of captions it is the centre of the
    largest cluster (cf. SmoothGuard; minimum-risk decoding, Kumar & Byrne 2004).

    >>> elect(["red", "Blue.", "blue"])
    1
    >>> elect(["a dog and a red car", "a cat", "a red car", "a red car and a cow", "a dog and a red car"])
    0
    """
    bags = [_words(answer) for answer in answers]
    short = max(len(bag) for bag in bags) <= SHORT
    shared = [[float(a == b) if short else _overlap(set(a), set(b)) for b in bags] for a in bags]
    alike = [sum(value >= OVERLAP for value in row) for row in shared]
    return max(range(len(bags)), key=lambda i: (alike[i], sum(shared[i]), -i))


def _words(answer: str) -> list[str]:
    return [word for word in re.findall(r"\w+", answer.lower()) if word not in _ARTICLES]


def _overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0
