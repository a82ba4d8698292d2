"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.norms import descend, direction, random_start
from codefend.attacks.search import Best, OnGradient, OnStep, gradient, score
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class PGD:
    """Steepest steps of fixed length with projection after each."""

    rel_step: float = 2.5  # times eps / steps
    momentum: float = 0.0  # share of the last direction kept; 0 is Madry's
    random_start: bool = True
    restarts: int = 1  # independent runs, best per example
    name: str = "pgd"
    on_step: OnStep | None = None
    on_gradient: OnGradient | None = None

    def __call__(
        self, objective: Objective, images: Tensor, budget: Budget, *, generator: Generator | None = None
    ) -> Tensor:
        if budget.eps == 0:
            return images
        clean = images.detach()
        best = Best(clean, score(self, objective, clean, budget.eot))
        last = clean
        for run in range(self.restarts):
            start = random_start(clean, budget, generator=generator) if self.random_start or run else clean
            last = self._run(objective, start, clean, budget, best, run * (budget.steps + 1))
        return best.settle(self, objective, last, budget)

    def _run(
        self, objective: Objective, images: Tensor, clean: Tensor, budget: Budget, best: Best, first: int
    ) -> Tensor:
        """One descent from ``images``; ``first`` numbers its first step for the hooks. Returns the last iterate."""
        step_size = self.rel_step * budget.eps / max(budget.steps, 1)
        velocity = torch.zeros_like(images)
        for step in range(budget.steps):
            losses, grad = gradient(self, objective, images, budget.eot, first + step)
            best.update(images, losses)
            velocity = self.momentum * velocity + (1 - self.momentum) * direction(grad, budget.norm)
            images = descend(images, velocity, step_size, clean, budget)
        best.update(images, score(self, objective, images, budget.eot, first + budget.steps))
        return images
