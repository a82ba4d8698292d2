"""Finite differences along random signs: RGF (Nesterov & Spokoiny 2017; AttackVLM's MF-tt) and SPSA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import BestImages, ImageAttack
from codefend.attacks.norms import Adam, descend, pixel_scale, project, random_signs, spread
from codefend.types import Budget, Objective


def rounds(queries: int, most: int, *, least_rounds: int = 8) -> tuple[int, int]:
    """Split a query budget into (rounds, queries per round): ``most`` each, fewer where 8 rounds would not fit."""
    each = min(most, max(queries // least_rounds, 2))
    return max(queries // each, 1), each


@dataclass(kw_only=True)
class RGF(ImageAttack):
    """Sign steps along an estimated gradient; ``budget.steps`` is the number of queries per image.

    Defaults of AttackVLM (Zhao et al. 2023, arXiv 2305.16934): 8 rounds of 100 queries, sigma 8/255, step 1/255
    at eps 8/255, here scaled with eps. Queries may leave the ball (never the pixel box); what is returned does not.
    """

    queries: int = 100  # per round, one of them at the iterate itself
    sigma: float = 8 / 255  # length of the finite difference per pixel
    rel_step: float = 1.0  # times eps / rounds
    name: str = "rgf"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        x = clean
        best = BestImages(clean, torch.full((len(clean),), torch.inf, dtype=clean.dtype, device=clean.device))
        count, each = rounds(budget.steps, self.queries)
        for step in range(count):
            losses = self.score(objective, x, budget.eot, step)
            best.update(x, losses)
            estimate = torch.zeros_like(x)
            for _ in range(each - 1):
                u = random_signs(x, generator)
                shifted = self.score(objective, (x + self.sigma * u).clamp(0, 1), budget.eot)
                estimate += spread(torch.nan_to_num(shifted - losses, posinf=0, neginf=0), u) * u
            x = descend(x, estimate, self.rel_step * budget.eps / count, clean, budget)
        best.update(x, self.score(objective, x, budget.eot, count))
        return self.select(best, objective, x, budget)


@dataclass(kw_only=True)
class SPSA(ImageAttack):
    """Adam on two-sided differences (Uesato et al. 2018, arXiv 1802.05666, Algorithm 1).

    ``budget.steps`` is the number of queries per image. They may leave the ball by ``delta`` (never the pixel box);
    what is returned does not.
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
