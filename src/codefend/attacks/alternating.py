"""An attack on image and prompt (after Co-Attack, arXiv 2206.09391, and VLAttack, arXiv 2310.04655)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from codefend.attacks.apgd import APGD
from codefend.attacks.base import ImageAttack, PromptObjective, TextAttack, nan_to_inf
from codefend.attacks.norms import choose
from codefend.attacks.prompt_edits import CharacterEdits
from codefend.attacks.prompt_injection import PlantedInstruction
from codefend.types import Budget, CodefendError


@dataclass(kw_only=True)
class AlternatingAttack(TextAttack):
    """Alternate between the prompt, for the current image, and the image, for that prompt; return the best pair.

    Co-Attack is one round; VLAttack alternates. ``budget.steps`` is divided among the rounds of the image attack; the
    text attack evaluates ``queries`` prompts per round.
    """

    rounds: int = 2
    queries: int = 40  # evaluations of the text attack, per round
    text: TextAttack = field(default_factory=CharacterEdits)
    image: ImageAttack = field(default_factory=APGD)
    name: str = "joint"

    def __post_init__(self) -> None:
        if min(self.rounds, self.queries) < 1:
            raise CodefendError(
                f"attack {self.name!r} needs rounds and queries of 1 or more, not {self.rounds}, {self.queries}"
            )

    def __call__(
        self,
        objective: PromptObjective,
        images: Tensor,
        prompts: Sequence[str],
        budget: Budget,
        *,
        generator: Generator | None = None,
    ) -> tuple[Tensor, list[str]]:
        clean = x = images.detach()
        best_images, best_prompts = clean, list(prompts)
        best = nan_to_inf(self.score(objective(prompts), clean, budget.eot))
        text_budget = replace(budget, steps=self.queries)
        image_budget = replace(budget, steps=max(budget.steps // self.rounds, 1))
        self.image.on_gradient = self.on_gradient
        for turn in range(self.rounds):
            _, current = self.text(objective, x, prompts, text_budget, generator=generator)
            x = self.image(objective(current), clean, image_budget, generator=generator)
            losses = nan_to_inf(self.score(objective(current), x, budget.eot, turn))
            better = losses < best
            best, best_images = torch.where(better, losses, best), choose(better, x, best_images)
            pairs = zip(better.tolist(), current, best_prompts, strict=True)
            best_prompts = [new if improved else old for improved, new, old in pairs]
        return best_images, best_prompts


@dataclass(kw_only=True)
class TargetedAlternatingAttack(AlternatingAttack):
    """`AlternatingAttack` with a planted instruction instead of typing errors, towards ``sentence``."""

    sentence: str = PlantedInstruction.sentence  # the answer that the attacker wants
    name: str = "joint-targeted"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text = PlantedInstruction(sentence=self.sentence)
