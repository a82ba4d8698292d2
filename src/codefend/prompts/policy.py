"""A prompt policy is data: what is put around the user's words before a model reads them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from codefend.core.files import write_atomic
from codefend.types import CodefendError

MAX_CHARS = 20_000  # of one field; a longer prompt is a mistake, and costs every request


@dataclass(frozen=True)
class PromptPolicy:
    """``system`` is an instruction beside the conversation; ``prefix`` and ``suffix`` stand around the user's words."""

    name: str
    system: str = ""
    prefix: str = ""
    suffix: str = ""

    def __call__(self, prompt: str) -> str:
        """Return one string for models without a system channel: system, blank line, prefix, prompt, suffix."""
        return f"{self.system}\n\n{self.wrap(prompt)}" if self.system else self.wrap(prompt)

    def wrap(self, prompt: str) -> str:
        """Return the user's words with prefix and suffix, for models that take the system text apart."""
        return f"{self.prefix}{prompt}{self.suffix}"

    def around(self, prompt: str) -> tuple[str, str]:
        """Return what stands before and after the user's words, for messages in several parts."""
        return self.prefix, self.suffix

    @property
    def empty(self) -> bool:
        return not (self.system or self.prefix or self.suffix)

    @property
    def key(self) -> str:
        """A fingerprint of the words; the name does not count."""
        return fingerprint(json.dumps([self.system, self.prefix, self.suffix]))


def fingerprint(content: str | bytes) -> str:
    """Name what a policy does, for caches and cards: 16 hexadecimal digits."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def save_policy(policy: PromptPolicy, path: str | Path) -> None:
    """Write ``policy`` as JSON, whole or not at all."""
    write_atomic(path, json.dumps(asdict(policy), ensure_ascii=False, indent=2) + "\n")


def load_policy(path: str | Path) -> PromptPolicy:
    """Read what ``save_policy`` wrote. Raises CodefendError for a missing or damaged file, a wrong key or a wrong type."""
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
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
