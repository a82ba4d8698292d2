"""A picture as another model's preprocessing would show it to its encoder: at another size, turned or mirrored.

A perturbation is a pattern on the grid of the encoder it was made for, and a purifier that has met one grid undoes
little on another. Input diversity (Xie et al. 2019, arXiv 1803.06978) does for attacks what this does for pairs and
guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 128  # pixels that the pocket's encoder and the trainings see
SIDES = (96, 128, 160, 192, 224)  # of a training picture of 128 pixels: from three quarters to one and three quarters


def fit_square(images: Tensor, side: int = SIDE) -> Tensor:
    """Pad with grey to a square and resize (antialiased, differentiable) to ``[B, 3, side, side]``."""
    height, width = images.shape[-2:]
    if height != width:
        gap, longer = abs(height - width), max(height, width)
        first = (gap // 2, gap - gap // 2)
        pads = (0, 0, *first) if width == longer else (*first, 0, 0)
        images = F.pad(images, pads, value=0.5)
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True)
class View:
    """``side`` pixels, a multiple of 32; ``quarters`` turns of 90 degrees, then mirrored or not."""

    side: int = SIDE
    quarters: int = 0
    mirrored: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, 3, side, side]`` as `fit_square` does it, then turned; differentiable."""
        turned = torch.rot90(fit_square(images, self.side), self.quarters, (2, 3))
        return turned.flip(-1) if self.mirrored else turned


def draw_view(rng: np.random.Generator) -> View:
    """Any of SIDES, half of the time turned or mirrored."""
    side = SIDES[int(rng.integers(len(SIDES)))]
    if rng.random() < 0.5:
        return View(side)
    return View(side, int(rng.integers(4)), bool(rng.integers(2)))
