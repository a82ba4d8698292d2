"""Adversarial patch: any pixel values, but only inside one square (Brown et al. 2017, arXiv 1712.09665; LaVAN)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import uniform
from codefend.types import Budget, Objective


@dataclass(kw_only=True)
class AdversarialPatch(ImageAttack):
    """Sign steps with momentum on the pixels of a square; ``budget.norm`` and ``eps`` do not apply.

    LaVAN (Karmon et al. 2018, arXiv 1801.02608) has 2% of the image; ``side`` 0.15 of the shorter side is that.
    """

    side: float = 0.15  # of the shorter side of the image
    place: tuple[float, float] | None = None  # (top, left) as shares of the free room; None draws one per example
    step_size: float = 8 / 255  # first step, pixel units; falls linearly to a tenth
    momentum: float = 0.9  # share of the last direction kept
    name: str = "patch"

    def mask(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        """1 inside each example's square, else 0: ``[B, 1, H, W]``."""
        height, width = images.shape[-2:]
        side = self._side(images)
        if self.place is None:
            share = uniform(images, generator, shape=(len(images), 2))
        else:
            share = images.new_tensor(self.place).expand(len(images), 2)
        room = images.new_tensor([height - side, width - side])
        corner = (share * (room + 1)).floor().minimum(room).view(-1, 2, 1)
        rows = torch.arange(height, device=images.device).view(1, -1)
        columns = torch.arange(width, device=images.device).view(1, -1)
        in_rows = (rows >= corner[:, 0]) & (rows < corner[:, 0] + side)
        in_columns = (columns >= corner[:, 1]) & (columns < corner[:, 1] + side)
        return (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1).to(images.dtype)

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        mask = self.mask(clean, generator=generator)
        best = self.best_of(objective, clean, budget.eot)
        x = torch.where(mask > 0, uniform(clean, generator), clean)
        velocity = torch.zeros_like(x)
        for step in range(budget.steps):
            losses, grad = self.gradient(objective, x, budget.eot, step)
            best.update(x, losses)
            velocity = self.momentum * velocity + (1 - self.momentum) * grad.sign()
            rate = self.step_size * (1 - 0.9 * step / budget.steps)
            x = torch.where(mask > 0, (x - rate * velocity.sign()).clamp(0, 1), clean)
        best.update(x, self.score(objective, x, budget.eot, budget.steps))
        return self.select(best, objective, x, budget)

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """Pixels by which the box around all changes is wider or higher than the square, ``[B]``."""
        changed = (images - clean).abs().amax(1) > 1e-6  # [B, H, W]
        spans = torch.stack([_span(changed.any(2)), _span(changed.any(1))]).amax(0)
        return (spans - self._side(images)).clamp_min(0).to(images.dtype)

    def _side(self, images: Tensor) -> int:
        shorter = min(images.shape[-2:])
        return min(max(round(self.side * shorter), 1), shorter)


def _span(hit: Tensor) -> Tensor:
    """Length from the first to the last true entry of each row ``[B, L]``; 0 where there is none."""
    place = torch.arange(1, hit.shape[1] + 1, device=hit.device)
    last = (hit * place).amax(1)
    first = (hit * place.flip(0)).amax(1)  # counted from the other end
    return torch.where(hit.any(1), last + first - hit.shape[1], torch.zeros_like(last))
