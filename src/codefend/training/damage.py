"""Smooth warps, fog and occlusion at random: kinds of damage that no evaluation uses.

The attacks held out for evaluation are an optimized flow (stAdv), a colour bound (Perc-AL) and an optimized patch;
random damage of related kinds prepares a purifier for them without training on them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.attacks.stadv import warp

Damage = Callable[[Tensor, np.random.Generator], Tensor]
WARP = 2.0  # pixels at most
FOG = 0.5  # opacity at most
RECTANGLE = 0.25  # of a side at most


def damage(images: Tensor, rng: np.random.Generator) -> Tensor:
    """``[B, 3, H, W]`` in [0, 1] with one of the three kinds of damage, the same for the whole batch."""
    kinds: tuple[Damage, ...] = (warp_smoothly, add_fog, occlude)
    return kinds[int(rng.integers(len(kinds)))](images, rng)


def warp_smoothly(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Elastic deformation (Simard et al. 2003): a smooth random flow of up to WARP pixels."""
    count, _, height, width = images.shape
    grid = int(rng.integers(3, 12))
    coarse = torch.from_numpy(rng.uniform(-WARP, WARP, (count, 2, grid, grid))).to(images)
    return warp(images, F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True))


def add_fog(images: Tensor, rng: np.random.Generator) -> Tensor:
    """A smooth veil of one light colour, of varying opacity."""
    count, _, height, width = images.shape
    coarse = torch.from_numpy(rng.uniform(0, 1, (count, 1, 4, 4))).to(images)
    opacity = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True) * float(rng.uniform(0.1, FOG))
    colour = torch.from_numpy(rng.uniform(0.6, 1.0, (count, 3, 1, 1))).to(images)
    return images + opacity * (colour - images)


def occlude(images: Tensor, rng: np.random.Generator) -> Tensor:
    """A rectangle over each image: noise, one colour, or a part of another image of the batch."""
    result, side = images.clone(), images.shape[-1]
    for index in range(len(images)):
        height, width = (int(side * rng.uniform(0.05, RECTANGLE)) + 1 for _ in range(2))
        top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
        kind = int(rng.integers(3))
        colour = torch.from_numpy(rng.uniform(0, 1, (3, 1, 1) if kind else (3, height, width))).to(images)
        fill = images[index - 1, :, :height, :width] if kind == 2 else colour
        result[index, :, top : top + height, left : left + width] = fill
    return result
