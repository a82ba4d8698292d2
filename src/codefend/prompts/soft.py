"""A soft prefix: embeddings learned for an open-weight victim, before the user's words.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691) on clean, attacked and purified pictures at once: the mean negative
log-likelihood of the right answers under the frozen victim is lowered in the ``[K, D]`` embeddings alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from codefend.prompts.items import Item
from codefend.prompts.learning import draw, rate, restore_state, save_state, update
from codefend.prompts.policy import fingerprint
from codefend.types import CodefendError, Victim, WhiteBox

MAX_TOKENS = 64  # of a prefix; each costs every request


@runtime_checkable
class OpenWeight(WhiteBox, Protocol):
    """A victim whose input embeddings can be given.

    Its ``loss`` and ``generate`` take a keyword ``prefix`` ``[K, D]``, embeddings that stand before every prompt.
    """

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Input embeddings ``[L_i, D]`` of each text."""
        ...


def open_weight(victim: Victim) -> Any:
    """``victim`` itself. Raises CodefendError when it takes no embeddings."""
    if not isinstance(victim, OpenWeight):
        raise CodefendError(f"victim {victim.name!r} takes no embeddings: a soft prefix needs an open-weight victim")
    return victim


class SoftPrompted:
    """A victim behind a soft prefix, with a victim's methods: exact for attacks that differentiate through it."""

    def __init__(self, victim: Victim, prefix: Tensor) -> None:
        self.victim, self.prefix, self.name = open_weight(victim), prefix, victim.name

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        answers: list[str] = self.victim.generate(images, prompts, prefix=self.prefix)
        return answers

    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        losses: Tensor = self.victim.loss(images, prompts, targets, prefix=self.prefix)
        return losses

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.victim.features(images)
        return features

    def margins(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        margins: list[Tensor] = self.victim.margins(images, prompts, targets, prefix=self.prefix)
        return margins

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        scores: Tensor = self.victim.word_scores(images, words)
        return scores


@dataclass(frozen=True)
class SoftPolicy:
    """A learned prefix ``[K, D]`` for the victim ``victim``; the words themselves stay as they are."""

    name: str
    prefix: Tensor
    victim: str

    empty = False

    def __call__(self, prompt: str) -> str:
        return prompt

    @property
    def key(self) -> str:
        return fingerprint(self.prefix.detach().float().contiguous().numpy().tobytes())

    def attach(self, victim: Victim) -> Victim:
        """Put the prefix into ``victim``. Raises CodefendError when it is another victim, or takes no embeddings."""
        if victim.name != self.victim:
            raise CodefendError(
                f"soft prefix {self.name!r} was learned for victim {self.victim!r}, not {victim.name!r}"
            )
        width = open_weight(victim).embed(["a"])[0].shape[-1]
        if width != self.prefix.shape[-1]:
            raise CodefendError(f"soft prefix {self.name!r} has width {self.prefix.shape[-1]}, the victim has {width}")
        return SoftPrompted(victim, self.prefix)


@dataclass(frozen=True)
class SoftConfig:
    """How a soft prefix is learned. It starts as the embeddings of ``start``, cut or repeated to ``tokens``."""

    tokens: int = 12
    steps: int = 240
    batch: int = 4
    lr: float = 3e-3
    warmup: int = 10
    clean_share: float = 0.4  # of a batch: clean items, so that the clean score holds
    check_every: int = 60  # steps between candidates that are judged on the selection set
    start: str = "Answer from what the picture shows and nothing else."


def start_prefix(victim: Any, config: SoftConfig) -> Tensor:
    """``[K, D]`` from the words of ``config.start``, cut or repeated."""
    words: Tensor = victim.embed([config.start or "."])[0].detach()
    turns = -(-config.tokens // len(words))
    return words.repeat(turns, 1)[: config.tokens].clone()


def train_soft(
    victim: Victim,
    items: Sequence[Item],
    config: SoftConfig,
    checkpoint: Path,
    judged: Callable[[SoftPolicy], None],
    *,
    seed: int = 0,
    advance: Callable[[int, str], None] = lambda steps, note: None,
) -> None:
    """Learn a prefix on ``items``; ``judged`` hears of it every ``check_every`` steps and at the end.

    Resumes from ``checkpoint``. Raises CodefendError when the victim takes no embeddings or the loss is not finite.
    """
    model = open_weight(victim)
    prefix = torch.nn.Parameter(start_prefix(model, config))
    parameters, optimizer = {"prefix": prefix}, torch.optim.Adam([prefix])
    step = restore_state(checkpoint, parameters, optimizer)
    advance(step, "")
    while step < config.steps:
        loss = _loss(model, draw(items, config.batch, config.clean_share, seed, step), prefix)
        update(optimizer, parameters, loss, config.lr * rate(step, config.steps, config.warmup), step)
        step += 1
        advance(1, f"loss {loss.item():.3f}")
        if step % config.check_every == 0 or step == config.steps:
            judged(SoftPolicy(f"soft-{step:04d}", prefix.detach().clone(), victim.name))
            save_state(checkpoint, parameters, optimizer, step)


def _loss(model: Any, batch: Sequence[Item], prefix: Tensor) -> Tensor:
    images = torch.stack([item.image for item in batch])
    losses: Tensor = model.loss(images, [i.prompt for i in batch], [i.answer for i in batch], prefix=prefix)
    return losses.mean()
