"""Random gradient-free attack: finite differences along random signs (Nesterov & Spokoiny 2017; AttackVLM's MF-tt)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import BestImages, ImageAttack
from codefend.attacks.norms import descend, random_signs, spread
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
