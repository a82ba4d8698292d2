"""Guides of a bridge: encoders' features, and the victim's words.

The pocket has word scores, which cost little more than its encoder; any other white box guides by its own answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend import victims
from codefend.attacks import objectives
from codefend.encoders.views import ViewedEncoder, draw_view
from codefend.tasks.language import CAPTION_PROMPT
from codefend.training.frozen import OWN, WORDS, AnyEncoder, load_encoders, word_objective
from codefend.types import CodefendError, HasAnswerLogits, Objective, WhiteBox
from codefend.victims.pocket import Pocket

TEMPERATURE = 0.05  # of word scores


class Guide(Protocol):
    """The frozen networks that a bridge is guided by."""

    @property
    def victim(self) -> WhiteBox:
        """The victim whose answers are protected."""
        ...

    def encoder(self, number: int) -> AnyEncoder:
        """The encoder whose features guide micro-batch ``number``; they take turns."""
        ...

    def objective(self, clean: Tensor) -> Objective:
        """The objective of mining, in turn with the features' objective."""
        ...

    def divergence(self, clean: Tensor, purified: Tensor) -> Tensor:
        """How far the words of ``purified`` are from those of ``clean``, ``[B]`` or ``[B, T]``."""
        ...


class PocketGuide:
    """Guides by a pocket's word scores."""

    def __init__(self, pocket: Pocket, encoders: Sequence[AnyEncoder]) -> None:
        self.victim, self.encoders = pocket, list(encoders)

    def encoder(self, number: int) -> AnyEncoder:
        return self.encoders[number % len(self.encoders)]

    def objective(self, clean: Tensor) -> Objective:
        """Cross-entropy away from the clean images' nearest words."""
        return word_objective(self.victim, clean)

    def divergence(self, clean: Tensor, purified: Tensor) -> Tensor:
        """KL divergence of the words near each token, clean from purified, ``[B, T]``."""
        with torch.no_grad():
            reference = (self.victim.word_scores(clean, WORDS) / TEMPERATURE).log_softmax(-1)
        words = (self.victim.word_scores(purified, WORDS) / TEMPERATURE).log_softmax(-1)
        return F.kl_div(words, reference, log_target=True, reduction="none").sum(-1)


class AnswerGuide:
    """Guides by a white box's own captions: its greedy answer to a clean image is the reference.

    The logits of purified and clean images are compared at every token of that answer where the victim gives them
    (`HasAnswerLogits`); else its loss on the answer is used.
    """

    def __init__(self, victim: WhiteBox, encoders: Sequence[AnyEncoder], *, prompt: str = CAPTION_PROMPT) -> None:
        self.victim, self.encoders, self.prompt = victim, list(encoders), prompt

    def encoder(self, number: int) -> AnyEncoder:
        return self.encoders[number % len(self.encoders)]

    def objective(self, clean: Tensor) -> Objective:
        """Untargeted: make the victim's own answer to the clean images unlikely."""
        prompts, answers = self.answers(clean)
        return objectives.untargeted(self.victim, prompts, answers)

    def divergence(self, clean: Tensor, purified: Tensor) -> Tensor:
        """Mean KL divergence per token of the answer, or the loss on it, ``[B]``."""
        prompts, answers = self.answers(clean)
        if not isinstance(self.victim, HasAnswerLogits):
            return self.victim.loss(purified, prompts, answers)
        with torch.no_grad():
            references = [row.log_softmax(-1) for row in self.victim.answer_logits(clean, prompts, answers)]
        rows = [row.log_softmax(-1) for row in self.victim.answer_logits(purified, prompts, answers)]
        pairs = zip(rows, references, strict=True)
        return torch.stack([F.kl_div(a, b, log_target=True, reduction="none").sum(-1).mean() for a, b in pairs])

    def answers(self, clean: Tensor) -> tuple[list[str], list[str]]:
        """The prompt for each image, and the victim's answers."""
        prompts = [self.prompt] * len(clean)
        return prompts, self.victim.generate(clean, prompts)


def load_guide(victim: str, encoders: Sequence[str]) -> Guide:
    """The guide by name; ``victim`` among the encoders is the victim's own.

    Raises CodefendError for a victim that only answers text, or without an encoder.
    """
    model = victims.load(victim)
    if not isinstance(model, WhiteBox):
        raise CodefendError(
            f"victim {model.name!r} only answers text, and guidance needs its gradient; use another victim"
        )
    if not encoders:
        raise CodefendError(f"name at least one encoder to guide by: encoders={OWN} is the victim's own")
    loaded = load_encoders(encoders, model)
    return PocketGuide(model, loaded) if isinstance(model, Pocket) else AnswerGuide(model, loaded)


# --- terms of a loss on vision tokens [B, T, D] ----------------------------------------------------------------------


def token_distance(tokens: Tensor, clean: Tensor) -> Tensor:
    """1 - cosine and a tenth of the relative squared error of each token, ``[B, T]``."""
    closeness = F.cosine_similarity(tokens, clean, dim=-1)
    error = (tokens - clean).square().sum(-1) / clean.square().sum(-1).clamp_min(1e-6)  # some encoders have zeros
    return 1 - closeness + 0.1 * error


def directional_hinge(tokens: Tensor, clean: Tensor, attacked: Tensor, *, margin: float = 0.1) -> Tensor:
    """Nearer to the clean than to the attacked token: a hinge ``[B, T]`` where the attack has moved the token."""
    moved = F.cosine_similarity(attacked, clean, dim=-1) < 0.9
    gap = F.cosine_similarity(tokens, attacked, dim=-1) - F.cosine_similarity(tokens, clean, dim=-1)
    return F.relu(gap + margin) * moved


def viewed(encoder: AnyEncoder, rng: np.random.Generator, *, share: float) -> AnyEncoder:
    """The encoder, with probability ``share`` on another view of its images, so that none depends on one pixel grid.

    A victim of your own prepares its images itself and has no other view.
    """
    if isinstance(encoder, ViewedEncoder) and rng.random() < share:
        return encoder.through(draw_view(rng))
    return encoder
