"""PerC-AL: a bound on perceived colour instead of pixel values (Zhao, Liu & Larson 2020, arXiv 1911.02466)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import choose, direction, random_signs, spread
from codefend.contrib.attacks.colour import ciede2000, lab
from codefend.types import Budget, Objective

ROUNDING = 0.5  # CIEDE2000 that 8 bits may add, dark pixels most
_BISECTIONS = 12  # halvings of the shrink factor: 1/4096 of it


def colour_distance(images: Tensor, clean: Tensor) -> Tensor:
    """Root mean square CIEDE2000 over the pixels, ``[B]``: the paper's C_2 over the square root of their number."""
    difference = ciede2000(lab(clean), lab(images))
    return difference.square().flatten(1).mean(1).sqrt()


def shrink(images: Tensor, clean: Tensor, limit: float) -> Tensor:
    """Move images outside the bound along the straight line to ``clean`` until they are ``limit`` away in colour."""
    inside = colour_distance(images, clean) <= limit
    low = torch.zeros(len(clean), dtype=clean.dtype, device=clean.device)
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        if bool(inside.all()):
            return images
        middle = (low + high) / 2
        fits = colour_distance(clean + spread(middle, clean) * (images - clean), clean) <= limit
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return choose(inside, images, clean + spread(low, clean) * (images - clean))


@dataclass(kw_only=True)
class PerCAL(ImageAttack):
    """Inside the bound a step down the objective, outside it a step back in colour; the best inside is returned.

    ``budget.norm`` and ``eps`` do not apply. The paper alternates on whether the image fools the classifier and
    minimizes the distance; here the reverse, the lowest objective within a distance. Step lengths are the
    paper's two, scaled from its l2 lengths at 299 px to root mean square per pixel.
    """

    limit: float = 2.3  # root mean square CIEDE2000; 2.3 is the just noticeable difference of Mahy et al. 1994
    step_size: float = 2 / 255  # of the objective's step, root mean square per pixel; falls linearly to a tenth
    back: float = 0.5  # length of the step back, share of ``step_size``
    name: str = "perc-al"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best = self.best_of(objective, clean, budget.eot)
        # At the clean image itself a feature objective and the colour distance have no slope.
        x = (clean + random_signs(clean, generator) * self.step_size / 10).clamp(0, 1)
        scale = clean[0].numel() ** 0.5
        for step in range(budget.steps):
            losses, grad = self.gradient(objective, x, budget.eot, step)
            inside, outward = self._colour(x, clean)
            best.update(x, torch.where(inside, losses, torch.full_like(losses, torch.nan)))
            rate = self.step_size * (1 - 0.9 * step / budget.steps) * scale
            down, home = rate * direction(grad, "l2"), rate * self.back * direction(outward, "l2")
            x = (x - choose(inside, down, home)).clamp(0, 1)
        last = shrink(x, clean, self.limit)
        best.update(last, self.score(objective, last, budget.eot, budget.steps))
        return self.select(best, objective, last, budget)

    def _colour(self, x: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Which images are inside the bound ``[B]``, and the gradient of the colour distance."""
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            distances = colour_distance(leaf, clean)
            (grad,) = torch.autograd.grad(distances.sum(), leaf)
        return distances.detach() <= self.limit, torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """CIEDE2000 beyond the limit, ``[B]``."""
        return (colour_distance(images, clean) - self.limit - ROUNDING).clamp_min(0)
