"""Simultaneous perturbation stochastic approximation (Uesato et al. 2018, arXiv 1802.05666, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.adam import Adam
from codefend.attacks.base import BestImages, ImageAttack
from codefend.attacks.norms import pixel_scale, project, random_signs, spread
from codefend.contrib.attacks.rgf import rounds
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class SPSA(ImageAttack):
    """Adam on two-sided differences along random signs; ``budget.steps`` is the number of queries per image.

    Queries may leave the ball by ``delta`` (never the pixel box); what is returned does not.
    """

    queries: int = 128  # per round: 64 pairs, less one for the iterate itself
    delta: float = 0.01  # half length of the finite difference per pixel
    rel_lr: float = 0.3  # Adam's step, times the ball's edge per pixel (0.01 at eps 8/255)
    name: str = "spsa"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best = BestImages(clean, torch.full((len(clean),), torch.inf, dtype=clean.dtype, device=clean.device))
        x, adam = clean, Adam()
        step_size = self.rel_lr * pixel_scale(clean, budget)
        count, each = rounds(budget.steps, self.queries)
        for step in range(count):
            best.update(x, self.score(objective, x, budget.eot, step))
            estimate = torch.zeros_like(x)
            for _ in range(max((each - 1) // 2, 1)):
                v = random_signs(x, generator)
                above = self.score(objective, (x + self.delta * v).clamp(0, 1), budget.eot)
                below = self.score(objective, (x - self.delta * v).clamp(0, 1), budget.eot)
                estimate += spread(torch.nan_to_num(above - below, posinf=0, neginf=0), v) * v
            x = project(x - step_size * adam(estimate), clean, budget)
        best.update(x, self.score(objective, x, budget.eot, count))
        return self.select(best, objective, x, budget)
