"""Prompt policies: the text around the user's prompt as data, and the protocols of all kinds of policies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol, runtime_checkable

from codefend.core.files import write_atomic
from codefend.types import CodefendError, Victim

MAX_CHARS = 20_000  # per field; a longer prompt is a mistake that every request pays for


@runtime_checkable
class Policy(Protocol):
    """A function from prompt to prompt, with a name and a fingerprint."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str:
        """A fingerprint of everything that decides the result, without the name."""
        ...

    def __call__(self, prompt: str) -> str: ...


@runtime_checkable
class TextPolicy(Policy, Protocol):
    """A policy that adds text to a prompt, for any model: fixed text, or text written for each prompt."""

    @property
    def system(self) -> str: ...
    @property
    def empty(self) -> bool:
        """Whether it never adds text."""
        ...

    def wrap(self, prompt: str) -> str: ...
    def around(self, prompt: str) -> tuple[str, str]: ...


@runtime_checkable
class VictimPolicy(Policy, Protocol):
    """A policy that changes the model's input rather than its text, such as a soft prefix."""

    def attach(self, victim: Victim) -> Victim:
        """``victim`` under this policy. Raises CodefendError for a victim that it doesn't fit."""
        ...


def attach(victim: Victim, policy: object) -> Victim:
    """``victim`` under ``policy`` where that is a `VictimPolicy`, else ``victim`` itself.

    Raises CodefendError for a victim that the policy doesn't fit.
    """
    return policy.attach(victim) if isinstance(policy, VictimPolicy) else victim


@dataclass(frozen=True)
class PromptPolicy:
    """``system`` is an instruction besides the conversation; ``prefix`` and ``suffix`` enclose the user's prompt."""

    name: str
    system: str = ""
    prefix: str = ""
    suffix: str = ""

    def __call__(self, prompt: str) -> str:
        """Return one string for models without a system channel: system, blank line, prefix, prompt, suffix."""
        return f"{self.system}\n\n{self.wrap(prompt)}" if self.system else self.wrap(prompt)

    def wrap(self, prompt: str) -> str:
        """Return the prompt with prefix and suffix, for models that take the system text separately."""
        return f"{self.prefix}{prompt}{self.suffix}"

    def around(self, prompt: str) -> tuple[str, str]:
        """Return the text before and after the prompt, for messages in several parts."""
        return self.prefix, self.suffix

    @property
    def empty(self) -> bool:
        return not (self.system or self.prefix or self.suffix)

    @property
    def key(self) -> str:
        return fingerprint(json.dumps([self.system, self.prefix, self.suffix]))


def fingerprint(content: str | bytes) -> str:
    """16 hexadecimal digits of a hash, for caches and cards."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def save_policy(policy: PromptPolicy, path: str | Path) -> None:
    """Write ``policy`` as JSON, atomically."""
    write_atomic(path, json.dumps(asdict(policy), ensure_ascii=False, indent=2) + "\n")


def load_policy(path: str | Path) -> PromptPolicy:
    """Read what `save_policy` wrote. Raises CodefendError for a missing or damaged file, a wrong key or type."""
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CodefendError(f"cannot read the prompt policy {file}: {reason}") from error
    known = [field.name for field in fields(PromptPolicy)]
    if not isinstance(data, dict) or "name" not in data:
        raise CodefendError(f'{file} is no prompt policy: expected {{"name": ..., "system": ..., "prefix": ..., ...}}')
    for key, value in data.items():
        if key not in known:
            raise CodefendError(f"{file}: unknown key {key!r}; known: {', '.join(known)}")
        if not isinstance(value, str):
            raise CodefendError(f"{file}: {key} must be text, not {type(value).__name__}")
        if len(value) > MAX_CHARS:
            raise CodefendError(f"{file}: {key} has {len(value):,} characters, over the limit of {MAX_CHARS:,}")
    if not data["name"].strip():
        raise CodefendError(f"{file}: name is empty")
    return PromptPolicy(**data)
