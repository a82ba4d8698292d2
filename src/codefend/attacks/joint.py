"""Picture and prompt together (after Co-Attack, arXiv 2206.09391, and VLAttack, arXiv 2310.04655)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from codefend.attacks.apgd import APGD
from codefend.attacks.norms import choose
from codefend.attacks.search import OnGradient, OnStep, score
from codefend.attacks.text import Asked, Characters, TextAttack
from codefend.types import Attack, Budget, CodefendError


@dataclass(kw_only=True)
class Joint:
    """In turns: the prompt for the present picture, then the picture for that prompt; the best pair is returned.

    Co-Attack is one round; VLAttack goes on in turns. ``budget.steps`` is shared out over the rounds of the image
    attack; the text attack looks ``queries`` times per round.
    """

    rounds: int = 2
    queries: int = 40  # looks of the text attack, per round
    text: TextAttack = field(default_factory=Characters)
    image: Attack = field(default_factory=APGD)
    name: str = "joint"
    on_step: OnStep | None = None
    on_gradient: OnGradient | None = None

    def __post_init__(self) -> None:
        if min(self.rounds, self.queries) < 1:
            raise CodefendError(
                f"attack 'joint' needs rounds and queries of 1 or more, not {self.rounds}, {self.queries}"
            )

    def __call__(
        self,
        asked: Asked,
        images: Tensor,
        prompts: Sequence[str],
        budget: Budget,
        *,
        generator: Generator | None = None,
    ) -> tuple[Tensor, list[str]]:
        clean = x = images.detach()
        best_images, best_prompts = clean, list(prompts)
        best = self._look(asked, clean, prompts, budget, None)
        self._listen()
        for turn in range(self.rounds):
            _, now = self.text(asked, x, prompts, replace(budget, steps=self.queries), generator=generator)
            steps = max(budget.steps // self.rounds, 1)
            x = self.image(asked(now), clean, replace(budget, steps=steps), generator=generator)
            losses = self._look(asked, x, now, budget, turn)
            better = losses < best
            best = torch.where(better, losses, best)
            best_images = choose(better, x, best_images)
            best_prompts = [n if b else o for n, o, b in zip(now, best_prompts, better.tolist(), strict=True)]
        return best_images, best_prompts

    def _look(self, asked: Asked, images: Tensor, prompts: Sequence[str], budget: Budget, step: int | None) -> Tensor:
        losses = score(self, asked(prompts), images, budget.eot, step)
        return torch.where(losses.isnan(), torch.full_like(losses, torch.inf), losses)

    def _listen(self) -> None:
        """Let the hook on gradients hear the image attack's."""
        if hasattr(self.image, "on_gradient"):
            self.image.on_gradient = self.on_gradient
