"""Momentum, Nesterov and input-diversity FGSM: transfer attacks.

MI: Dong et al. 2018 (arXiv 1710.06081, Algorithm 1). NI: Lin et al. 2020 (arXiv 1908.06281, eq. 6-8).
DI: Xie et al. 2019 (arXiv 1803.06978, sec. 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate, pad

from codefend.attacks.base import BestImages, ImageAttack
from codefend.attacks.norms import descend, project, spread, uniform
from codefend.types import Budget, Objective


def diversify(images: Tensor, low: float, generator: Generator | None) -> Tensor:
    """Shrink to a random ``low``..1 of the size and zero-pad back at a random place; differentiable, same shape."""
    height, width = images.shape[-2:]
    draws = uniform(images, generator, shape=(3,)).tolist()
    scale = low + (1 - low) * draws[0]
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    small = interpolate(images, size=(h, w), mode="bilinear", align_corners=False)
    top, left = int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1))
    return pad(small, (left, width - w - left, top, height - h - top))


@dataclass(kw_only=True)
class MIFGSM(ImageAttack):
    """Sign steps along an accumulated, normalized gradient; options add the look-ahead and the random resizing."""

    decay: float = 1.0  # mu: share of the accumulated gradient kept
    rel_step: float = 1.0  # times eps / steps
    nesterov: bool = False  # NI: the gradient is taken one step ahead
    diversity: float = 0.0  # DI: chance of a random resize per gradient sample (the paper's p is 0.5)
    resize_low: float = 0.9  # smallest size of DI, share of the image's side
    name: str = "mifgsm"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best, x = self.best_of(objective, clean, budget.eot), clean
        step_size = self.rel_step * budget.eps / max(budget.steps, 1)
        g = torch.zeros_like(clean)
        for step in range(budget.steps):
            ahead = self.decay * step_size * g if self.nesterov else torch.zeros_like(g)
            query = project(x - ahead, clean, budget)
            grad = self._gradient(objective, query, budget, step, best, generator)
            # The mean, not the sum, of absolute values: the same direction, and NI's look-ahead keeps pixel units.
            g = self.decay * g + grad / spread(_nonzero(grad.abs().flatten(1).mean(1)), grad)
            x = descend(x, g, step_size, clean, budget)
        best.update(x, self.score(objective, x, budget.eot, budget.steps))
        return self.select(best, objective, x, budget)

    def _gradient(
        self,
        objective: Objective,
        query: Tensor,
        budget: Budget,
        step: int,
        best: BestImages,
        generator: Generator | None,
    ) -> Tensor:
        """The gradient at ``query``, which is also a candidate for the best; losses of resized images are not."""
        if self.diversity <= 0:
            losses, grad = self.gradient(objective, query, budget.eot, step)
            best.update(query, losses)
            return grad

        def diverse(images: Tensor) -> Tensor:
            if float(uniform(images, generator, shape=(1,))) >= self.diversity:
                return objective(images)
            return objective(diversify(images, self.resize_low, generator))

        best.update(query, self.score(objective, query, budget.eot))
        return self.gradient(diverse, query, budget.eot, step)[1]


def _nonzero(values: Tensor) -> Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny)
