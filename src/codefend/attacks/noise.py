"""Uniform random noise in the ball: a control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import random_start
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class RandomNoise(ImageAttack):
    """The best of a few uniform draws and the clean image; ``budget.steps`` has no effect."""

    draws: int = 10  # independent draws, best per example
    name: str = "noise"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best, last = self.best_of(objective, clean, budget.eot), clean
        for draw in range(self.draws):
            last = random_start(clean, budget, generator=generator)
            best.update(last, self.score(objective, last, budget.eot, draw))
        return self.select(best, objective, last, budget)
