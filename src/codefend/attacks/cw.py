"""Carlini & Wagner's l2 attack on the objective, kept inside the ball (arXiv 1608.04644, sec. V-B and VI-A)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import Adam, pixel_scale, project
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class CW(ImageAttack):
    """Adam on ``const * objective + |delta|_2^2``, delta in units of the ball's edge.

    The paper's first box constraint, projection, replaces its tanh: the tanh has no slope at pixels that are 0 or 1,
    as flat backgrounds are. The budget is fixed, so instead of the outer search over ``const`` the weight of the
    distance falls to 0: a const too small for a strong defense would otherwise look like robustness.
    """

    const: float = 10.0  # first weight of the objective; the edge of the ball has squared distance 1
    rel_lr: float = 0.1  # Adam's first step, times the ball's edge per pixel; falls linearly to 0
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's averages
    name: str = "cw"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        edge = pixel_scale(clean, budget)
        best = self.best_of(objective, clean, budget.eot)
        x, adam = clean, Adam(self.betas)
        for step in range(budget.steps):
            left = 1 - step / budget.steps
            penalty = max(2 * left - 1, 0.0)  # 0 from half of the steps on
            losses, grad = self.gradient(objective, x, budget.eot, step)
            best.update(x, losses)
            outward = 2 * (x - clean) / (edge**2 * clean[0].numel())
            slope = torch.nan_to_num(self.const * grad, posinf=0.0, neginf=0.0) + penalty * outward
            x = project(x - self.rel_lr * edge * left * adam(slope), clean, budget)
        best.update(x, self.score(objective, x, budget.eot, budget.steps))
        return self.select(best, objective, x, budget)
