"""Uniform random noise in the ball: the control that every attack has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from codefend.attacks.norms import random_start
from codefend.attacks.search import Best, OnGradient, OnStep, score
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class Noise:
    """The best of a few uniform draws and the clean image; ``budget.steps`` is not used."""

    draws: int = 10  # independent draws, best per example
    name: str = "noise"
    on_step: OnStep | None = None
    on_gradient: OnGradient | None = None

    def __call__(
        self, objective: Objective, images: Tensor, budget: Budget, *, generator: Generator | None = None
    ) -> Tensor:
        if budget.eps == 0:
            return images
        clean = last = images.detach()
        best = Best(clean, score(self, objective, clean, budget.eot))
        for draw in range(self.draws):
            last = random_start(clean, budget, generator=generator)
            best.update(last, score(self, objective, last, budget.eot, draw))
        return best.settle(self, objective, last, budget)
