"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import BestImages, ImageAttack
from codefend.attacks.norms import descend, direction, random_start
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class PGD(ImageAttack):
    """Steepest steps of constant length with projection after each."""

    rel_step: float = 2.5  # times eps / steps
    momentum: float = 0.0  # share of the last direction kept; 0 is Madry's
    random_start: bool = True
    restarts: int = 1  # independent runs, best per example
    name: str = "pgd"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best, last = self.best_of(objective, clean, budget.eot), clean
        for run in range(self.restarts):
            start = random_start(clean, budget, generator=generator) if self.random_start or run else clean
            last = self._run(objective, start, clean, budget, best, run * (budget.steps + 1))
        return self.select(best, objective, last, budget)

    def step_size(self, step: int, budget: Budget) -> float:
        """Length of step number ``step``, counted from 0, in pixel units."""
        return self.rel_step * budget.eps / max(budget.steps, 1)

    def accumulate(self, velocity: Tensor, grad: Tensor, budget: Budget) -> Tensor:
        """The direction of the next step, from that of the last one and the gradient."""
        return self.momentum * velocity + (1 - self.momentum) * direction(grad, budget.norm)

    def _run(
        self, objective: Objective, images: Tensor, clean: Tensor, budget: Budget, best: BestImages, first: int
    ) -> Tensor:
        """One descent from ``images``; ``first`` numbers its first step for the hooks. Returns the last iterate."""
        velocity = torch.zeros_like(images)
        for step in range(budget.steps):
            losses, grad = self.gradient(objective, images, budget.eot, first + step)
            best.update(images, losses)
            velocity = self.accumulate(velocity, grad, budget)
            images = descend(images, velocity, self.step_size(step, budget), clean, budget)
        best.update(images, self.score(objective, images, budget.eot, first + budget.steps))
        return images
