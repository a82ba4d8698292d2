"""A defended victim is a victim: the same methods, so every attack, task and metric works on it unchanged.

Attack the bare victim and judge the defended one: the oblivious threat (T0). Attack the defended one: adaptive (T2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from codefend.core.devices import default_device
from codefend.prompts.asking import prompted
from codefend.types import Purifier, Victim, WhiteBox


@dataclass(frozen=True)
class Defense:
    """A purifier, a prompt policy, or both. ``None`` leaves that side alone."""

    purifier: Purifier | None = None
    policy: Callable[[str], str] | None = None  # of codefend.prompts: words around words, or a soft prefix
    name: str = "none"

    def images(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """What the victim sees, ``[B,3,H,W]``, where the images lay; purified on the default device."""
        if self.purifier is None:
            return images
        return self.purifier(images.to(default_device()), generator=generator).to(images.device)

    def prompts(self, prompts: Sequence[str]) -> list[str]:
        return list(prompts) if self.policy is None else [self.policy(p) for p in prompts]


class _StraightThroughFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, purified: Tensor) -> Tensor:
        return purified

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class StraightThrough:
    """Wrap a purifier without a gradient: exact forward, identity backward (BPDA, Athalye et al. 2018, sec. 4.1)."""

    def __init__(self, purifier: Purifier) -> None:
        self.purifier = purifier

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        with torch.no_grad():
            purified = self.purifier(images, generator=generator)
        result: Tensor = _StraightThroughFn.apply(images, purified)  # type: ignore[no-untyped-call]
        return result


class DefendedVictim:
    """``victim`` behind ``defense``. Each call draws fresh purifier noise unless ``generator`` is given.

    Raises CodefendError for a soft prefix that was learned for another victim.
    """

    def __init__(self, victim: Victim, defense: Defense, *, generator: Generator | None = None) -> None:
        self.victim, self.defense, self.generator = prompted(victim, defense.policy), defense, generator
        self.name = f"{victim.name}+{defense.name}"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        with torch.no_grad():
            purified = self.defense.images(images, generator=self.generator)
        return self.victim.generate(purified, self.defense.prompts(prompts))

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        """``[B]``; raises TypeError when the victim is a black box."""
        victim = self._white_box()
        purified = self.defense.images(images, generator=self.generator)
        return victim.loss(purified, self.defense.prompts(prompts), targets)

    def features(self, images: Tensor) -> Tensor:
        """``[B, T, D]``; raises TypeError when the victim is a black box."""
        return self._white_box().features(self.defense.images(images, generator=self.generator))

    def margins(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        """Of each image's target tokens, ``[L_i]``; raises AttributeError when the victim shows no logits."""
        shown: Any = self.victim
        purified = self.defense.images(images, generator=self.generator)
        margins: list[Tensor] = shown.margins(purified, self.defense.prompts(prompts), targets)
        return margins

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """``[B, T, C]``; raises AttributeError when the victim has no space that tokens and words share."""
        shown: Any = self.victim
        scores: Tensor = shown.word_scores(self.defense.images(images, generator=self.generator), words)
        return scores

    def _white_box(self) -> WhiteBox:
        if not isinstance(self.victim, WhiteBox):
            raise TypeError(f"{self.victim.name} is a black box: it has no gradient to attack")
        return self.victim
