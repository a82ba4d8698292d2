"""Who proposes new prompt texts: a language model in this process, an OpenAI-compatible endpoint, or edit operators.

Whatever they say is checked before it is used; a proposer that fails is replaced by the operators, and the run goes on.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from codefend.core.runs import make_generator
from codefend.types import CodefendError

if TYPE_CHECKING:
    from codefend.prompts.writer import Writer

MAX_PROPOSAL = 600  # characters; every request pays for a prompt, and a longer one is a model running on
PATIENCE = 3  # failures in a row before a proposer is given up
KEY_VARIABLE = "CODEFEND_PROPOSER_KEY"

Failure = Mapping[str, str]  # "family", "question", "answer", "right"


class Proposer(Protocol):
    """Proposes a text for one field of a policy; ``turn`` numbers the proposals of a run."""

    name: str

    def __call__(self, component: str, text: str, failures: Sequence[Failure], turn: int) -> str: ...


class BadProposal(Exception):
    """A proposal that cannot be used; the message says why."""


def clean_proposal(raw: str, *, max_chars: int = MAX_PROPOSAL) -> str:
    """The text inside what a model said: no fence, label, quotes, control characters or doubled space.

    Raises BadProposal when it is empty, too long, or holds a chat template's marks (they would end the user's turn).
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
    """Ask a language model for a better text. ``complete`` maps a prompt to the model's words."""

    def __init__(self, complete: Callable[[str], str], name: str = "model") -> None:
        self.complete, self.name = complete, name

    def __call__(self, component: str, text: str, failures: Sequence[Failure], turn: int) -> str:
        """Raises BadProposal for an unusable text, and whatever ``complete`` raises."""
        return clean_proposal(self.complete(request(component, text, failures)))


class WriterProposer:
    """Ask the small model here. Each turn has its own noise, so that a killed run goes on with the same proposals."""

    name = "local"

    def __init__(self, writer: Writer, seed: int = 0) -> None:
        self.writer, self.seed = writer, seed

    def __call__(self, component: str, text: str, failures: Sequence[Failure], turn: int) -> str:
        """Raises BadProposal for an unusable text."""
        noise = make_generator(self.seed, "proposals", turn)
        return clean_proposal(self.writer.complete(request(component, text, failures), generator=noise))


def request(component: str, text: str, failures: Sequence[Failure]) -> str:
    """What a model is asked; short, for small models."""
    lines = [
        "A vision-language model answers questions about pictures. Some pictures were tampered with by an attacker, "
        f'and some questions hold planted instructions. Its {component} instruction is now: "{text or "(none)"}"',
        "With it the model made these mistakes:",
        *(
            f'- {f["family"]}: asked "{f["question"]}", answered "{f["answer"]}", right is "{f["right"]}"'
            for f in failures
        ),
        "Write one better instruction of one or two sentences. It must help with any picture, and must not make the "
        "model refuse harmless questions. Reply with the instruction only.",
    ]
    return "\n".join(line[:400] for line in lines)


class Endpoint:
    """``complete`` over an OpenAI-compatible chat endpoint. The key is read from CODEFEND_PROPOSER_KEY, never kept."""

    def __init__(self, url: str, model: str, *, timeout: float = 60.0, transport: object = None) -> None:
        if not re.match(r"https?://", url):
            raise CodefendError(f"the proposer's address must start with http:// or https://, not {url!r}")
        if not model:
            raise CodefendError("an endpoint needs the name of a model: --set gepa.model=NAME")
        _key()  # told now, not by every request
        self.url, self.model, self.timeout, self.transport = url.rstrip("/"), model, timeout, transport

    def __call__(self, prompt: str) -> str:
        """The model's words. Raises BadProposal for a failed request or an answer of another shape."""
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
                answer = client.post(f"{self.url}/chat/completions", json=body, headers=headers)
                answer.raise_for_status()
                return str(answer.json()["choices"][0]["message"]["content"] or "")
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise BadProposal(f"the endpoint failed: {error}") from error


def _key() -> str:
    """The endpoint's key, "" for none. Raises CodefendError for one that no header can carry, without saying it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()  # a file's line end is no part of it
    if not (key.isascii() and key.isprintable()):  # the client's own complaint would quote it
        raise CodefendError(f"{KEY_VARIABLE} holds characters that no key has; copy it again")
    return key


class Resilient:
    """``first`` while it works; the operators for a proposal that it fails, and for good after PATIENCE in a row."""

    def __init__(self, first: Proposer, spare: Proposer) -> None:
        self.first, self.spare, self.name = first, spare, first.name
        self.failures = self._row = 0

    def __call__(self, component: str, text: str, failures: Sequence[Failure], turn: int) -> str:
        if self._row < PATIENCE and self.first is not self.spare:
            try:
                proposal = self.first(component, text, failures, turn)
                self._row = 0
                return proposal
            except BadProposal as error:
                self.failures += 1
                self._row += 1
                given_up = "; edit operators from now on" if self._row == PATIENCE else ""
                print(f"proposal refused: {error}{given_up}", file=sys.stderr)
        return self.spare(component, text, failures, turn)
