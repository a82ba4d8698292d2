"""The prefix generator: a small language model with LoRA that reads a query and writes text to put around it.

After CoDefend (Zhu et al. 2025, arXiv 2510.11096); trained by ``codefend.training.prompt_search.generator``.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from codefend.prompts.operators import SENTENCES
from codefend.prompts.proposers import BadProposal, clean_proposal
from codefend.prompts.writer import CHAT, Writer

REQUEST = "What is asked of the picture here, as it should be said: {query}"  # frozen: the shipped weights know it
MAX_QUERY, MAX_PREFIX = 400, 160  # characters
CACHE_SIZE = 4096  # queries
WORD_SIMILARITY = 0.6  # of `difflib`; a word of seven letters with two typing errors reaches it
CHECKED_LETTERS = 4  # shorter words are not looked up in the query: two typing errors leave nothing of them

Place = Literal["before", "after"]


@dataclass
class GeneratedPolicy:
    """Writes a text for each query, and caches it: the same query gets the same text."""

    name: str
    writer: Writer
    tokens: int
    key: str
    place: Place = "before"
    system: str = ""
    _cache: dict[str, str] = field(default_factory=dict, repr=False)

    empty: ClassVar[bool] = False

    def prefix(self, query: str) -> str:
        """The text for a query; "" for none, and where the generated one cannot be used."""
        if query not in self._cache:
            if len(self._cache) >= CACHE_SIZE:
                self._cache.pop(next(iter(self._cache)))
            context = query_context(self.writer, query)
            text = usable(self.writer.sample([context], self.tokens)[0]) if self.writer.gate_opens(context) else ""
            self._cache[query] = text if is_faithful(query, text) else ""
        return self._cache[query]

    def around(self, prompt: str) -> tuple[str, str]:
        """The text before and after the prompt."""
        return around(self.prefix(prompt), self.place)

    def wrap(self, prompt: str) -> str:
        """The prompt with the text around it."""
        before, after = self.around(prompt)
        return f"{before}{prompt}{after}"

    def __call__(self, prompt: str) -> str:
        return self.wrap(prompt)


def around(text: str, place: Place) -> tuple[str, str]:
    """The text before and after a query for ``text`` at ``place``; empty without a text."""
    if not text:
        return "", ""
    return (f"{text}\n", "") if place == "before" else ("", f"\n{text}")


def query_context(writer: Writer, query: str) -> list[int]:
    """The generator's input: the first characters of the query, without marks of a chat template."""
    plain = query.replace("<|", "< |")[:MAX_QUERY]
    return writer.encode(CHAT.format(text=REQUEST.format(query=plain)))


def usable(text: str) -> str:
    """The generated text, cleaned; "" when it cannot be used."""
    try:
        return clean_proposal(text, max_chars=MAX_PREFIX)
    except BadProposal:
        return ""


def is_faithful(query: str, text: str) -> bool:
    """Whether a text may be put around a query: a sentence of the bank, or correctly spelled words of the query.

    A small model sometimes replaces a word of the query by one that it knows better.
    """
    if any(text in sentences for sentences in SENTENCES.values()):
        return True
    query_words, words = (re.findall(r"\w+", part.lower()) for part in (query, text))
    checked = [word for word in words if len(word) >= CHECKED_LETTERS]
    return all(difflib.get_close_matches(word, query_words, 1, WORD_SIMILARITY) for word in checked)
