"""Query pairs, on which the generator is trained: a query as received, and the text to write for it.

For queries with typing errors or planted instructions the target is the original query; for plain or harmless ones it
is no text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from codefend.core.text_edits import rewrite, typos
from codefend.prompts.items import Item

MAX_TYPOS = 4  # per query

DATA: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
# Questions about images of all kinds, so that the generator isn't tied to those of its items; templates of questions
# about many things, so that it learns to repeat a query and not the most frequent ones.
QUESTIONS, TEMPLATES, THINGS = DATA["questions"], DATA["templates"], DATA["things"]
# Planted instructions. Words and positions differ from those of the bench's attacks (`attacks.prompt_injection`): the
# generator should learn to recognize any instruction.
PLANTED, HARMLESS = DATA["planted"], DATA["harmless"]


class QueryPair(NamedTuple):
    """A query as it reaches the generator, and the text to write for it: "" for a query to be left alone."""

    query: str
    target: str


class QueryPairs:
    """Pairs of the ``items``' queries and general ones, where ``sentences`` and the items' answers are planted."""

    def __init__(self, items: Sequence[Item], sentences: Sequence[str], seed: int) -> None:
        self.queries = sorted({item.plain for item in items if item.plain})
        self.sentences, self.seed = [*sentences, *sorted({item.answer for item in items})], seed

    def draw(self, count: int, step: int) -> list[QueryPair]:
        """The pairs of ``step``; about 30% are plain or harmless, the others are damaged."""
        rng = random.Random(f"{self.seed} pairs {step}")
        return [self._pair(rng) for _ in range(count)]

    def _pair(self, rng: random.Random) -> QueryPair:
        query = rng.choice(self.queries) if self.queries and rng.random() < 0.4 else random_question(rng)
        kind = rng.random()
        if kind < 0.15:
            return QueryPair(query, "")
        if kind < 0.3:
            return QueryPair(rng.choice(HARMLESS).format(prompt=query), "")
        if kind < 0.65 or not self.sentences:
            return QueryPair(with_typos(query, rng.randint(1, MAX_TYPOS), rng), query)
        return QueryPair(rng.choice(PLANTED).format(prompt=query, sentence=rng.choice(self.sentences)), query)


def random_question(rng: random.Random) -> str:
    """A question that a user may ask about an image."""
    if rng.random() < 0.25:
        return rng.choice(QUESTIONS)
    a, b = rng.sample(THINGS, 2)
    return rng.choice(TEMPLATES).format(a=a, b=b, s=f"{a}s")


def with_typos(text: str, count: int, rng: random.Random) -> str:
    """``text`` with ``count`` random typing errors of the kinds that the attack ``characters`` searches."""
    letters = list(text)
    for _ in range(count):
        if edits := typos(letters):
            letters = rewrite(letters, [rng.choice(edits)])
    return "".join(letters)
