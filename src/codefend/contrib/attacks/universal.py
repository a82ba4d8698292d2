"""Universal perturbation: one delta for many images (Moosavi-Dezfooli et al. 2017; Shafahi et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import direction, length, spread, uniform
from codefend.types import Budget, Objective

Batch = tuple[Objective, Tensor]  # an objective and its images [B, 3, H, W]


@dataclass(kw_only=True)
class UniversalPerturbation(ImageAttack):
    """``fit`` one delta on batches, ``apply`` it to any images of that size.

    Called as an attack, it fits one delta on the batch, with the lowest mean objective.
    """

    rel_step: float = 2.5  # times eps / steps
    name: str = "universal"

    def fit(self, batches: Sequence[Batch], budget: Budget, *, generator: Generator | None = None) -> Tensor:
        """The delta ``[1, 3, H, W]`` in the ball with the lowest mean objective; batches take turns by step."""
        first = batches[0][1][:1].detach()
        best, best_loss = torch.zeros_like(first), self._mean(batches, torch.zeros_like(first), budget)
        if budget.eps == 0:
            return best
        delta = _ball(budget.eps * (2 * uniform(first, generator) - 1), budget)
        for step in range(budget.steps):
            objective, images = batches[step % len(batches)]
            _, grad = self.gradient(objective, self.apply(images.detach(), delta), budget.eot, step)
            slope = direction(grad.mean(0, keepdim=True), budget.norm)
            delta = _ball(delta - self.rel_step * budget.eps / budget.steps * slope, budget)
            if (step + 1) % len(batches) == 0 or step + 1 == budget.steps:  # after a pass: evaluate on every batch
                loss = self._mean(batches, delta, budget)
                if loss < best_loss:
                    best, best_loss = delta, loss
        return best

    @staticmethod
    def apply(images: Tensor, delta: Tensor) -> Tensor:
        """``images + delta`` inside the pixel box."""
        return (images + delta).clamp(0.0, 1.0)

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        return self.apply(clean, self.fit([(objective, clean)], budget, generator=generator))

    def _mean(self, batches: Sequence[Batch], delta: Tensor, budget: Budget) -> float:
        losses = [self.score(objective, self.apply(images, delta), budget.eot) for objective, images in batches]
        return float(torch.cat(losses).mean())


def _ball(delta: Tensor, budget: Budget) -> Tensor:
    if budget.norm == "linf":
        return delta.clamp(-budget.eps, budget.eps)
    size = length(delta, "l2").clamp_min(torch.finfo(delta.dtype).tiny)
    return delta * spread((budget.eps / size).clamp_max(1.0), delta)
