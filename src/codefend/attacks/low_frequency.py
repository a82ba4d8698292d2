"""Low-frequency attack: a perturbation of few cosines, against purifiers that remove or mask high frequencies.

DiffBreak (Kassis et al. 2025, arXiv 2411.16598) finds that perturbations at low frequencies survive diffusion
purification, and bounds them by LPIPS, which needs a further network. Here the same kind of perturbation is written
in the discrete cosine basis (Guo, Frank & Weinberger 2018, arXiv 1809.08758) and bounded by ``Budget``'s ball, so that
its figures compare with those of other attacks at equal eps. Written from the papers' descriptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import Adam, pixel_scale, project
from codefend.core.seeds import noise_like
from codefend.types import Budget, CodefendError, Objective


@dataclass(kw_only=True)
class LowFrequency(ImageAttack):
    """Adam on the lowest ``share`` of the cosine frequencies along each side, from a random start.

    With u the inverse transform of the coefficients, in units of the ball's edge per pixel, l-inf images are
    ``clean + eps * tanh(u)``: inside the ball everywhere and as smooth as u, where a clipped u would have edges. l2
    images are the projection of ``clean + u``. The pixel box clips both.
    """

    share: float = 0.125  # of the frequencies along each side: 1/8 of 128 pixels are waves of 16 pixels and longer
    rel_lr: float = 0.2  # Adam's first step of u, root mean square per pixel; falls linearly to 0
    name: str = "low-frequency"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise CodefendError(f"share of attack {self.name!r} is above 0, to 1, not {self.share:g}")

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        rows, columns = (self._basis(side, clean) for side in clean.shape[-2:])
        # A step of 1 in each of the few coefficients is this much per pixel, root mean square.
        scale = (rows.shape[0] * columns.shape[0] / (rows.shape[1] * columns.shape[1])) ** 0.5

        def perturbed(coefficients: Tensor) -> Tensor:
            u = rows.T @ coefficients @ columns / scale
            if budget.norm == "linf":
                return torch.clamp(clean + budget.eps * u.tanh(), 0, 1)
            return project(clean + pixel_scale(clean, budget) * u, clean, budget)

        def of_coefficients(coefficients: Tensor) -> Tensor:
            images = perturbed(coefficients)
            if images.requires_grad:  # the transform would spread one bad entry over the whole gradient
                images.register_hook(finite)
            return objective(images)

        best = self.best_of(objective, clean, budget.eot)
        start = clean.new_zeros(*clean.shape[:2], rows.shape[0], columns.shape[0])
        coefficients, adam = start + self.rel_lr * noise_like(start, generator), Adam()
        for step in range(budget.steps):
            losses, grad = self.gradient(of_coefficients, coefficients, budget.eot, step)
            best.update(perturbed(coefficients), losses)
            rate = self.rel_lr * (1 - step / budget.steps)
            coefficients = coefficients - rate * adam(grad)
        last = perturbed(coefficients)
        best.update(last, self.score(objective, last, budget.eot, budget.steps))
        return self.select(best, objective, last, budget)

    def _basis(self, side: int, like: Tensor) -> Tensor:
        """The lowest cosines of ``side`` pixels, ``[K, side]``; at least two, as one alone only shifts the colour."""
        return dct_matrix(side, like)[: max(round(self.share * side), 2)]


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """Orthonormal DCT-II as a matrix ``[size, size]``, row k the frequency k; its transpose is the inverse."""
    k = torch.arange(size, device=like.device, dtype=torch.float64)
    matrix = (math.pi / size * (k + 0.5) * k.unsqueeze(1)).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like.dtype)


def finite(gradient: Tensor) -> Tensor:
    """``gradient`` with zeros for the entries that are not finite, as a hook."""
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
