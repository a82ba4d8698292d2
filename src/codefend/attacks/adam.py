"""Adam's update direction, for attacks."""

from __future__ import annotations

import torch
from torch import Tensor


class Adam:
    """Adam's direction (Kingma & Ba 2015, Algorithm 1), entry by entry, so that its state is per example.

    ``torch.optim.Adam`` computes the same after seconds of imports.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.betas, self.steps = betas, 0
        self.mean = self.square = torch.zeros(())

    def __call__(self, grad: Tensor) -> Tensor:
        """The next direction of ascent, about 1 per entry: bias-corrected mean over root mean square."""
        first, second = self.betas
        self.steps += 1
        self.mean = first * self.mean.to(grad) + (1 - first) * grad
        self.square = second * self.square.to(grad) + (1 - second) * grad.square()
        mean, square = self.mean / (1 - first**self.steps), self.square / (1 - second**self.steps)
        return mean / (square.sqrt() + 1e-12)
