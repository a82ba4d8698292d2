"""Soft prefixes: learned embeddings before the user's prompt, for the open-weight victim that they were learned with.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691); trained by ``codefend.training.prompt_search.soft``.

Shape legend: K tokens of the prefix, D width of the victim's embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from codefend.prompts.policy import WrappedVictim, fingerprint
from codefend.types import CodefendError, Victim, WhiteBox

MAX_TOKENS = 64  # of a prefix; each costs every request


@runtime_checkable
class OpenWeight(WhiteBox, Protocol):
    """A victim that takes input embeddings.

    Its ``loss``, ``generate`` and ``margins`` have a keyword ``prefix`` ``[K, D]``: embeddings before every prompt.
    """

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Input embeddings ``[L_i, D]`` of each text."""
        ...


def open_weight(victim: Victim) -> Any:
    """``victim`` itself. Raises CodefendError when it takes no embeddings."""
    if not isinstance(victim, OpenWeight):
        raise CodefendError(f"victim {victim.name!r} takes no embeddings: a soft prefix needs an open-weight victim")
    return victim


class SoftPromptedVictim(WrappedVictim):
    """A victim behind a soft prefix: exact gradients for attacks through it. Create one with `SoftPolicy.attach`."""

    def __init__(self, victim: Victim, prefix: Tensor) -> None:
        self.name, self.keywords = victim.name, {"prefix": prefix}


@dataclass(frozen=True)
class SoftPolicy:
    """A learned prefix ``[K, D]`` for the victim called ``victim``; the text of a prompt stays unchanged."""

    name: str
    prefix: Tensor
    victim: str

    def __call__(self, prompt: str) -> str:
        return prompt

    @property
    def key(self) -> str:
        return fingerprint(self.prefix.detach().float().contiguous().numpy().tobytes())

    def attach(self, victim: Victim) -> Victim:
        """``victim`` behind the prefix, with the capabilities that it has itself.

        Raises CodefendError when it is another victim, or takes no embeddings.
        """
        if victim.name != self.victim:
            raise CodefendError(
                f"soft prefix {self.name!r} was learned for victim {self.victim!r}, not {victim.name!r}"
            )
        width = open_weight(victim).embed(["a"])[0].shape[-1]
        if width != self.prefix.shape[-1]:
            raise CodefendError(f"soft prefix {self.name!r} has width {self.prefix.shape[-1]}, the victim has {width}")
        return SoftPromptedVictim(victim, self.prefix)
