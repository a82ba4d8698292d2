"""SSA-CWA: spectrum simulation inside the common weakness attack, the attack on Bard (Dong et al. 2023, 2309.11751).

SSA: Long et al. 2022 (arXiv 2207.05382, eq. 5). CWA: Chen et al. 2023 (arXiv 2303.09105, Algorithm 1). As in the
attack on Bard, CWA runs without its reverse step, and the inner momentum is shared by the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.low_frequency import dct_matrix, finite
from codefend.attacks.norms import descend, direction, pixel_scale, project, spread, uniform
from codefend.attacks.objectives import Ensemble
from codefend.core.seeds import noise_like
from codefend.types import Budget, Objective


def simulate_spectrum(images: Tensor, sigma: float, rho: float, generator: Generator | None) -> Tensor:
    """IDCT(DCT(x + N(0, sigma^2)) * M), M ~ U(1 - rho, 1 + rho): its frequencies as other models weigh them."""
    rows, columns = dct_matrix(images.shape[-2], images), dct_matrix(images.shape[-1], images)
    spectrum = rows @ (images + sigma * noise_like(images, generator)) @ columns.T
    mask = 1 + rho * (2 * uniform(images, generator) - 1)
    back: Tensor = rows.T @ (spectrum * mask) @ columns
    if back.requires_grad:  # the transform would smear one bad entry over the whole gradient
        back.register_hook(finite)
    return back


@dataclass(kw_only=True)
class SSACWA(ImageAttack):
    """Outer sign steps along the path of one inner step per model of an `objectives.Ensemble` (or the one objective).

    Defaults of the attack on Bard: 500 steps of eps / 16, 20 spectra per gradient. An inner step is 250 times the
    unit gradient at 224 px and eps 16/255, which is 10 times the ball's edge per pixel.
    """

    samples: int = 20  # spectra averaged per gradient
    rho: float = 0.5  # spread of the spectral mask
    rel_sigma: float = 1.0  # noise before the transform, times the ball's edge per pixel
    rel_inner: float = 10.0  # inner step, root mean square per pixel, times the ball's edge
    rel_step: float = 1 / 16  # outer step, times eps
    decay: float = 1.0  # mu of both momenta
    name: str = "ssa-cwa"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        parts: Sequence[Objective] = objective.parts if isinstance(objective, Ensemble) else (objective,)
        best, x = self.best_of(objective, clean, budget.eot), clean
        inner, outer = torch.zeros_like(clean), torch.zeros_like(clean)
        for step in range(budget.steps):
            moved = x
            for number, part in enumerate(parts):
                grad = self._slope(part, moved, budget, step if number == 0 else None, generator)
                inner = self.decay * inner + direction(grad, "l2")
                reach = self.rel_inner * pixel_scale(clean, budget) * clean[0].numel() ** 0.5
                moved = project(moved - reach * inner, clean, budget)
            size = (x - moved).abs().flatten(1).sum(1).clamp_min(torch.finfo(x.dtype).tiny)
            outer = self.decay * outer + (x - moved) / spread(size, x)
            x = descend(x, outer, self.rel_step * budget.eps, clean, budget)
            best.update(x, self.score(objective, x, budget.eot))
        return self.select(best, objective, x, budget)

    def _slope(
        self, part: Objective, images: Tensor, budget: Budget, step: int | None, generator: Generator | None
    ) -> Tensor:
        sigma = self.rel_sigma * pixel_scale(images, budget)

        def simulated(x: Tensor) -> Tensor:
            return part(simulate_spectrum(x, sigma, self.rho, generator))

        return self.gradient(simulated, images, self.samples * max(budget.eot, 1), step)[1]
