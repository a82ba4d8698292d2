"""What guides a bridge: encoders' features, and the victim's words.

The pocket has word scores that cost nothing beside its encoder; any other white box is asked for its own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend import victims
from codefend.attacks import objectives
from codefend.tasks.language import CAPTION_PROMPT
from codefend.training.pairs import OWN, WORDS, Tower, word_objective
from codefend.types import CodefendError, Objective, WhiteBox
from codefend.victims.pocket import Pocket


class Guide:
    """The frozen networks that say what a picture means: feature towers, and a pocket's words."""

    def __init__(self, pocket: Pocket, towers: list[Tower]) -> None:
        self.victim, self.towers = pocket, towers

    def tower(self, step: int) -> Tower:
        return self.towers[step % len(self.towers)]

    def away(self, clean: Tensor) -> Objective:
        """What mining lowers beside the features' objective."""
        return word_objective(self.victim, clean)

    def divergence(self, clean: Tensor, seen: Tensor) -> Tensor:
        """KL divergence of the words that each token is near, clean from purified, ``[B, T]``."""
        with torch.no_grad():
            wanted = (self.victim.word_scores(clean, WORDS) / 0.05).log_softmax(-1)
        said = (self.victim.word_scores(seen, WORDS) / 0.05).log_softmax(-1)
        return F.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)


class OwnGuide:
    """A white box as its own guide, asked for a caption. ``towers``: encoders whose tokens guide, itself among them.

    What it says of a clean picture, greedily, is taken as right. Where it gives its logits (``answer_logits``) the
    purified picture's are compared with the clean one's at every token of that answer; else its loss on the answer is.
    """

    def __init__(self, victim: WhiteBox, towers: Sequence[Tower | WhiteBox], *, prompt: str = CAPTION_PROMPT) -> None:
        self.victim, self.towers, self.prompt = victim, list(towers), prompt

    def tower(self, step: int) -> Tower | WhiteBox:
        return self.towers[step % len(self.towers)]

    def away(self, clean: Tensor) -> Objective:
        """Untargeted: make the victim's own answer to the clean pictures unlikely."""
        prompts, answers = self._answers(clean)
        return objectives.untargeted(self.victim, prompts, answers)

    def divergence(self, clean: Tensor, seen: Tensor) -> Tensor:
        """``[B]``: mean Kullback-Leibler divergence per token of the answer, or its loss."""
        prompts, answers = self._answers(clean)
        logits: Any = getattr(self.victim, "answer_logits", None)
        if logits is None:
            return self.victim.loss(seen, prompts, answers)
        with torch.no_grad():
            wanted = [row.log_softmax(-1) for row in logits(clean, prompts, answers)]
        said = [row.log_softmax(-1) for row in logits(seen, prompts, answers)]
        pairs = zip(said, wanted, strict=True)
        return torch.stack([F.kl_div(a, b, log_target=True, reduction="none").sum(-1).mean() for a, b in pairs])

    def _answers(self, clean: Tensor) -> tuple[list[str], list[str]]:
        prompts = [self.prompt] * len(clean)
        return prompts, self.victim.generate(clean, prompts)


def find_guide(victim: str, encoders: Sequence[str]) -> Guide | OwnGuide:
    """The guide by name; ``victim`` among the encoders is the victim's own.

    Raises CodefendError for a victim that only answers text, or without an encoder.
    """
    model = victims.load(victim)
    if not isinstance(model, WhiteBox):
        raise CodefendError(
            f"victim {model.name!r} only answers text, and guidance needs its gradient; use another victim"
        )
    towers: list[Any] = [model if name == OWN else Tower(name) for name in encoders]
    if not towers:
        raise CodefendError(f"name at least one encoder to guide by: encoders={OWN} is the victim's own")
    return Guide(model, towers) if isinstance(model, Pocket) else OwnGuide(model, towers)
