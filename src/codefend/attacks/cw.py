"""Carlini & Wagner's l2 attack on the objective, kept inside the ball (arXiv 1608.04644, sec. V-B and VI-A)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.norms import pixel_scale, project
from codefend.attacks.search import Adam, Best, OnGradient, OnStep, gradient, score
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class CW:
    """Adam on ``const * objective + |delta|_2^2``, delta in units of the ball's edge.

    The paper's first box constraint, projection, replaces its tanh: the tanh has no slope at pixels that are 0 or 1,
    as flat backgrounds are. The budget is fixed, so instead of the outer search over ``const`` the distance fades out:
    a const too small for a strong defense would otherwise pass for robustness.
    """

    const: float = 10.0  # first weight of the objective; the edge of the ball has squared distance 1
    rel_lr: float = 0.1  # Adam's first step, times the ball's edge per pixel; falls linearly to 0
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's averages
    name: str = "cw"
    on_step: OnStep | None = None
    on_gradient: OnGradient | None = None

    def __call__(
        self, objective: Objective, images: Tensor, budget: Budget, *, generator: Generator | None = None
    ) -> Tensor:
        if budget.eps == 0:
            return images
        clean = images.detach()
        edge = pixel_scale(clean, budget)
        best = Best(clean, score(self, objective, clean, budget.eot))
        x, adam = clean, Adam(self.betas)
        for step in range(budget.steps):
            left = 1 - step / budget.steps
            penalty = max(2 * left - 1, 0.0)  # gone at half-time
            losses, grad = gradient(self, objective, x, budget.eot, step)
            best.update(x, losses)
            outward = 2 * (x - clean) / (edge**2 * clean[0].numel())
            slope = torch.nan_to_num(self.const * grad, posinf=0.0, neginf=0.0) + penalty * outward
            x = project(x - self.rel_lr * edge * left * adam(slope), clean, budget)
        best.update(x, score(self, objective, x, budget.eot, budget.steps))
        return best.settle(self, objective, x, budget)
