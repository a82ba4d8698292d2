"""PGD with momentum whose steps fall geometrically, for stochastic defenses.

Constant steps keep jumping where the gradient is noisy, and the step rule of auto-PGD reads noise as missing progress.
A fixed schedule depends on neither. Defaults: 40 steps from eps to eps / 20, momentum 0.75.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codefend.attacks.norms import spread
from codefend.attacks.pgd import PGD
from codefend.types import Budget


@dataclass(kw_only=True)
class PGDDecay(PGD):
    """Steepest steps along accumulated gradients; their length falls geometrically from ``rel_step`` to ``rel_last``.

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
