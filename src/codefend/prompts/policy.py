"""Prompt policies: the text around the user's prompt as data, all kinds of policies, and victims behind one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from codefend.core.files import write_atomic
from codefend.types import (
    CodefendError,
    HasAnswerLogits,
    HasClassScores,
    HasFeatures,
    HasLoss,
    HasMargins,
    HasWordScores,
    Victim,
)

if TYPE_CHECKING:
    from torch import Tensor

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


class WrappedVictim:
    """``victim`` behind something that changes what it is given, with its capabilities, no more and no fewer.

    Subclasses change images, prompts or keywords; ask ``isinstance(wrapped, HasLoss)`` and so on for capabilities.
    """

    victim: Any
    keywords: Mapping[str, Any] = {}  # further arguments of calls with prompts

    def __new__(cls, victim: Victim, *arguments: Any, **keywords: Any) -> Self:
        methods = tuple(m for capability, m in _CAPABILITIES.items() if isinstance(victim, capability))
        composed: Any = _composed((*methods, cls))
        wrapped: Self = object.__new__(composed)
        wrapped.victim = victim
        return wrapped

    def changed_images(self, images: Tensor) -> Tensor:
        return images

    def changed_prompts(self, prompts: Sequence[str]) -> Sequence[str]:
        return prompts

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        images, prompts = self.changed_images(images), self.changed_prompts(prompts)
        answers: list[str] = self.victim.generate(images, prompts, **self.keywords)
        return answers


class _Loss(WrappedVictim):
    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        """``[B]``, see `HasLoss`."""
        images, prompts = self.changed_images(images), self.changed_prompts(prompts)
        loss: Tensor = self.victim.loss(images, prompts, targets, **self.keywords)
        return loss


class _AnswerLogits(WrappedVictim):
    def answer_logits(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        """``[L_i, V]`` for each image, see `HasAnswerLogits`."""
        images, prompts = self.changed_images(images), self.changed_prompts(prompts)
        logits: list[Tensor] = self.victim.answer_logits(images, prompts, targets, **self.keywords)
        return logits


class _Features(WrappedVictim):
    def features(self, images: Tensor) -> Tensor:
        """``[B, T, D]``, see `HasFeatures`."""
        features: Tensor = self.victim.features(self.changed_images(images))
        return features


class _Margins(WrappedVictim):
    def margins(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        """``[L_i]`` for each image, see `HasMargins`."""
        images, prompts = self.changed_images(images), self.changed_prompts(prompts)
        margins: list[Tensor] = self.victim.margins(images, prompts, targets, **self.keywords)
        return margins


class _WordScores(WrappedVictim):
    @property
    def vocabulary(self) -> Sequence[str]:
        """The victim's, see `HasWordScores`."""
        vocabulary: Sequence[str] = self.victim.vocabulary
        return vocabulary

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """``[B, T, C]``, see `HasWordScores`."""
        scores: Tensor = self.victim.word_scores(self.changed_images(images), words)
        return scores


class _ClassScores(WrappedVictim):
    @property
    def classes(self) -> Sequence[str]:
        """The victim's, see `HasClassScores`."""
        classes: Sequence[str] = self.victim.classes
        return classes

    def class_scores(self, images: Tensor) -> Tensor:
        """``[B, C]``, see `HasClassScores`."""
        scores: Tensor = self.victim.class_scores(self.changed_images(images))
        return scores


_CAPABILITIES: dict[type, type[WrappedVictim]] = {
    HasLoss: _Loss,
    HasFeatures: _Features,
    HasMargins: _Margins,
    HasAnswerLogits: _AnswerLogits,
    HasWordScores: _WordScores,
    HasClassScores: _ClassScores,
}


@cache
def _composed(bases: tuple[type[WrappedVictim], ...]) -> type[WrappedVictim]:
    cls = bases[-1]
    return type(cls.__name__, bases, {"__doc__": cls.__doc__, "__module__": cls.__module__})


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
