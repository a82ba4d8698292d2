"""PGD with momentum whose steps fall linearly, for stochastic defenses.

Constant steps keep jumping where the gradient is noisy, and the step rule of auto-PGD reads noise as missing progress.
A fixed schedule depends on neither. Defaults: 40 steps from eps to eps / 20, momentum 0.75.
"""

from __future__ import annotations

from dataclasses import dataclass

from codefend.attacks.pgd import PGD
from codefend.types import Budget


@dataclass(kw_only=True)
class PGDDecay(PGD):
    """Steepest steps whose length falls linearly from ``rel_step`` to ``rel_last``, along averaged directions.

    With ``Budget.eot`` above 1 every loss and gradient is a mean over that many samples, and the image with the lowest
    mean loss is returned unless the last iterate is better on fresh samples.
    """

    rel_step: float = 1.0  # first step, times eps
    rel_last: float = 0.05  # last step, times eps
    momentum: float = 0.75  # share of the last direction kept
    name: str = "pgd-decay"

    def step_size(self, step: int, budget: Budget) -> float:
        share = step / max(budget.steps - 1, 1)
        return budget.eps * (self.rel_step + (self.rel_last - self.rel_step) * share)
