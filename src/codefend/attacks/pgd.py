"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, eq. 4), with constant or with falling steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import BestImages, ImageAttack
from codefend.attacks.norms import descend, direction, random_start, spread
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


@dataclass(kw_only=True)
class PGDDecay(PGD):
    """Steepest steps along accumulated gradients; their length falls geometrically from ``rel_step`` to ``rel_last``.

    For stochastic defenses: constant steps keep jumping where the gradient is noisy, and the step rule of auto-PGD
    reads noise as missing progress. A fixed schedule depends on neither.

    Gradients are divided by their mean size before they are added up (Dong et al. 2018, arXiv 1710.06081, eq. 6). With
    ``Budget.eot`` above 1 every loss and gradient is a mean over that many samples, and the image with the lowest mean
    loss is returned unless the last iterate is better on fresh samples.
    """

    rel_step: float = 1.0  # first step, times eps
    rel_last: float = 0.05  # last step, times eps
    momentum: float = 0.75  # share of the accumulated gradient kept
    name: str = "pgd-decay"

    def step_size(self, step: int, budget: Budget) -> float:
        share = step / max(budget.steps - 1, 1)
        return budget.eps * self.rel_step * float((self.rel_last / self.rel_step) ** share)

    def accumulate(self, velocity: Tensor, grad: Tensor, budget: Budget) -> Tensor:
        size = grad.abs().flatten(1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny)
        return self.momentum * velocity + grad / spread(size, grad)
