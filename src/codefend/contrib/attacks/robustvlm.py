"""RobustVLM's schedule: auto-PGD in half precision from the clean image, then in float32 from the best so far.

Schlarmann & Hein 2023 (arXiv 2308.10741); Schlarmann et al. 2024 (arXiv 2402.12336). Half of the steps each. Only a GPU
computes in half precision; on a CPU both halves are float32, which the attack doesn't lose by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from codefend.attacks.apgd import APGD
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class RobustVLM(APGD):
    """Two runs of auto-PGD without random starts."""

    name: str = "robustvlm"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        first, second = budget.steps // 2, budget.steps - budget.steps // 2

        def in_half(images: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.float16, enabled=images.is_cuda):
                return objective(images).float()

        overall, start, last = self.best_of(objective, clean, budget.eot), clean, clean
        for run, (goal, steps) in enumerate(((in_half, first), (objective, second))):
            if steps:
                best, last = self._run(goal, start, clean, replace(budget, steps=steps), run * (first + 1))
                overall.update(best.images, best.losses)
                start = overall.images
        return self.select(overall, objective, last, budget)
