"""Views of an image, as the preprocessing of another model may give: resized, rotated, mirrored; encoders behind them.

A perturbation is a pattern on the pixel grid of the encoder that it attacks, and a purifier trained on one grid removes
little on another. Input diversity (Xie et al. 2019, arXiv 1803.06978) uses such views for attacks.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend import encoders
from codefend.core.devices import default_device

SIDE = 128  # of training images and of the pocket's encoder, pixels
SIDES = (96, 128, 160, 192, 224)  # 0.75 to 1.75 times a training image of 128 pixels


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
    """Resized to ``side`` pixels, a multiple of 32; rotated by ``quarters`` of 90 degrees; then ``mirrored``."""

    side: int = SIDE
    quarters: int = 0
    mirrored: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """The view ``[B, 3, side, side]`` of ``[B, 3, H, W]``, resized by `fit_square`; differentiable."""
        rotated = torch.rot90(fit_square(images, self.side), self.quarters, (2, 3))
        return rotated.flip(-1) if self.mirrored else rotated


def draw_view(rng: np.random.Generator) -> View:
    """A view of a random side in `SIDES`; half of them are also rotated or mirrored at random."""
    side = SIDES[int(rng.integers(len(SIDES)))]
    if rng.random() < 0.5:
        return View(side)
    return View(side, int(rng.integers(4)), bool(rng.integers(2)))


class ViewedEncoder:
    """An encoder by name or folder on the default device, with a `View` of its images.

    Raises CodefendError for an unknown encoder.
    """

    def __init__(self, name: str, view: View | None = None) -> None:
        self.name, self.encoder = name, encoders.load(name).to(default_device())
        self.view = view or View()

    def through(self, view: View) -> Self:
        """The same encoder through another view."""
        other = copy(self)
        other.view = view
        return other

    def features(self, images: Tensor) -> Tensor:
        """Vision tokens ``[B, T, D]``, see `HasFeatures`."""
        tokens: Tensor = self.encoder(self.viewed(images))
        return tokens.to(images.device)

    def viewed(self, images: Tensor) -> Tensor:
        """What the encoder receives, on its device."""
        return self.view(images.to(self.encoder.device))
