"""Proposers of new prompt texts: the local language model, an OpenAI-compatible endpoint, or edit operators.

Every proposal is checked before it is used. Where a proposer fails, the edit operators replace it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from codefend.core.seeds import make_generator
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.prompts.writer import Writer

MAX_PROPOSAL = 600  # characters; every request pays for a prompt, and longer ones are degenerate
MAX_FAILURES = 3  # in a row, before a proposer is replaced for good
KEY_VARIABLE = "CODEFEND_PROPOSER_KEY"

Failure = Mapping[str, str]  # "family", "question", "answer", "expected"


class Proposer(Protocol):
    """Proposes a text for one field of a policy; ``turn`` numbers the proposals of a run. May raise BadProposal."""

    name: str

    def __call__(self, component: str, text: str, failures: Sequence[Failure], turn: int) -> str: ...


class BadProposal(Exception):
    """A proposal that cannot be used; the message says why."""


def clean_proposal(raw: str, *, max_chars: int = MAX_PROPOSAL) -> str:
    """The text of a model's reply without fence, label, quotes, control characters or repeated white space.

    Raises BadProposal when it is empty, too long, or has marks of a chat template, which would end the user's turn.
    """
    text = re.sub(r"```[a-z]*\n?|```", "", raw)
    text = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
    text = re.sub(r"^\s*(?:new |improved |better )?(?:instruction|prompt|prefix)s?:\s*", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+", " ", text).strip().strip("\"'`“”").strip()
    if not re.search(r"\w", text):
        raise BadProposal("it is empty")
    if len(text) > max_chars:
        raise BadProposal(f"it has {len(text):,} characters, over the limit of {max_chars:,}")
    if re.search(r"<\|.*?\|>|\[/?INST\]|</?s>|<image>", text):
        raise BadProposal("it holds marks of a chat template")
    return text


class ModelProposer:
    """Asks a language model for a better text. ``complete`` maps a request and the turn to the model's reply."""

    def __init__(self, complete: Callable[[str, int], str], name: str) -> None:
        self.complete, self.name = complete, name

    @classmethod
    def local(cls, writer: Writer, seed: int) -> ModelProposer:
        """The language model of this process, with noise for each turn, so that a resumed run proposes the same."""

        def complete(prompt: str, turn: int) -> str:
            return writer.complete(prompt, generator=make_generator(seed, "proposals", turn))

        return cls(complete, "local")

    def __call__(self, component: str, text: str, failures: Sequence[Failure], turn: int) -> str:
        """Raises BadProposal for an unusable text, and as ``complete`` does."""
        return clean_proposal(self.complete(request_text(component, text, failures), turn))


def request_text(component: str, text: str, failures: Sequence[Failure]) -> str:
    """The request to a model; short, for small models."""
    lines = [
        "A vision-language model answers questions about images. Some images were tampered with by an attacker, "
        f'and some questions hold planted instructions. Its {component} instruction is now: "{text or "(none)"}"',
        "With it the model made these mistakes:",
        *(
            f'- {f["family"]}: asked "{f["question"]}", answered "{f["answer"]}", expected "{f["expected"]}"'
            for f in failures
        ),
        "Write one better instruction of one or two sentences. It must help with any image, and must not make the "
        "model refuse harmless questions. Reply with the instruction only.",
    ]
    return "\n".join(line[:400] for line in lines)


class ChatEndpoint:
    """An OpenAI-compatible chat endpoint as ``complete``. CODEFEND_PROPOSER_KEY is read when it is used, not stored."""

    def __init__(self, url: str, model: str, *, timeout: float = 60.0, transport: object = None) -> None:
        if not re.match(r"https?://", url):
            raise CodefendError(f"the proposer's address must start with http:// or https://, not {url!r}")
        if not model:
            raise CodefendError("an endpoint needs the name of a model: --set gepa.model=NAME")
        _key()  # fail early
        self.url, self.model, self.timeout, self.transport = url.rstrip("/"), model, timeout, transport

    def __call__(self, prompt: str, turn: int = 0) -> str:
        """The model's reply. Raises BadProposal for a failed request or a malformed response."""
        import httpx2

        key = _key()
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 200,
            "temperature": 0.9,
        }
        try:
            with httpx2.Client(timeout=self.timeout, transport=self.transport) as client:  # type: ignore[arg-type]
                headers = {"authorization": f"Bearer {key}"} if key else {}
                response = client.post(f"{self.url}/chat/completions", json=body, headers=headers)
                response.raise_for_status()
                return str(response.json()["choices"][0]["message"]["content"] or "")
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise BadProposal(f"the endpoint failed: {error}") from error


def _key() -> str:
    """The endpoint's key, "" for none. Raises CodefendError for one that no header can carry; the message hides it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()  # without the line end of a file
    if not (key.isascii() and key.isprintable()):  # the client's own error would quote it
        raise CodefendError(f"{KEY_VARIABLE} holds characters that no key has; copy it again")
    return key


class FallbackProposer:
    """``first``, or ``fallback`` for a proposal that ``first`` fails, and for good after MAX_FAILURES in a row."""

    def __init__(self, first: Proposer, fallback: Proposer) -> None:
        self.first, self.fallback, self.name = first, fallback, first.name
        self.failures = 0  # in a row

    def __call__(self, component: str, text: str, failures: Sequence[Failure], turn: int) -> str:
        if self.failures < MAX_FAILURES:
            try:
                proposal = self.first(component, text, failures, turn)
            except BadProposal as error:
                self.failures += 1
                last = self.failures == MAX_FAILURES
                print(f"proposal refused: {error}{'; edit operators from now on' * last}", file=sys.stderr)
            else:
                self.failures = 0
                return proposal
        return self.fallback(component, text, failures, turn)
