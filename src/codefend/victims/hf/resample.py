"""Pillow's resampling as a differentiable linear map, in floating point or with Pillow's own 8-bit arithmetic.

Processors resize 8-bit images with Pillow: one side, then the other, each pass a weighted mean over a window that
grows with the shrinking factor, rounded to whole levels (Pillow's ``Resample.c``; filters after Turkowski 1990,
Keys 1981 and Duchon 1979). Here one dense matrix per side does the same for every filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from codefend.types import CodefendError

FIXED_POINT = 2.0**22  # Pillow's weights for 8-bit images are whole multiples of 1 / FIXED_POINT


def _sinc(x: Tensor) -> Tensor:
    return torch.sinc(x)


def _triangle(x: Tensor) -> Tensor:
    return 1 - x.abs()


def _keys(x: Tensor, a: float = -0.5) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, far)


def _hamming(x: Tensor) -> Tensor:
    return torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x))


# Pillow's number of the filter -> (half width, the filter inside it)
FILTERS: dict[int, tuple[float, Callable[[Tensor], Tensor]]] = {
    1: (3.0, lambda x: _sinc(x) * _sinc(x / 3)),  # Lanczos
    2: (1.0, _triangle),  # bilinear
    3: (2.0, _keys),  # bicubic
    4: (0.5, torch.ones_like),  # box
    5: (1.0, _hamming),
}


@lru_cache(maxsize=32)
def weights(old: int, new: int, filter_: int) -> Tensor:
    """The map of one side, ``[new, old]`` float64, each row summing to one. Raises CodefendError for another filter."""
    if filter_ not in FILTERS:
        raise CodefendError(f"resampling filter {filter_} has no gradient; known: {sorted(FILTERS)} (Pillow's numbers)")
    half, shape = FILTERS[filter_]
    stretch = max(old / new, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * (old / new)
    first = (centre - half * stretch + 0.5).trunc().clamp(min=0)[:, None]
    last = (centre + half * stretch + 0.5).trunc().clamp(max=old)[:, None]
    place = torch.arange(old, dtype=torch.float64)
    offset = (place + 0.5 - centre[:, None]) / stretch
    inside = (place >= first) & (place < last) & (offset.abs() < half if filter_ != 4 else offset.abs() <= half)
    table = torch.where(inside, shape(offset), 0.0)
    return table / table.sum(1, keepdim=True)


@lru_cache(maxsize=256)
def vertical_first(tall: int, wide: int, height: int, width: int, filter_: int) -> bool:
    """Whether the installed Pillow resizes ``tall`` x ``wide`` to ``height`` x ``width`` vertically first.

    Pillow 13 does so for some sizes, by a rule that may change again, and the rounding between the passes makes the
    order visible. So it is tested on random pixels, once for each pair of sizes.
    """
    from transformers.image_transforms import resize
    from transformers.image_utils import ChannelDimension, PILImageResampling

    if tall == height or wide == width:
        return False
    pixels = np.random.default_rng(0).integers(0, 256, (3, tall, wide), dtype=np.uint8)
    way = ChannelDimension.FIRST
    kind = PILImageResampling(filter_)
    from_pillow = resize(pixels, (height, width), resample=kind, data_format=way, input_data_format=way)
    ops, levels = Levels(exact=True), torch.from_numpy(pixels).double()
    horizontal_first = ops.side(ops.side(levels, -1, width, filter_), -2, height, filter_)
    return not np.array_equal(horizontal_first.numpy(), from_pillow)


@dataclass(frozen=True)
class Levels:
    """Operations on images ``[B, 3, H, W]`` in levels 0 to 255.

    ``exact`` repeats Pillow's arithmetic on 8 bits: rounding after each pass, its gradient taken as the identity's.
    Otherwise nothing is rounded, which gives attacks a smooth function within about a level of the exact one.
    """

    exact: bool

    def read(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to levels. Float64 when exact: whole numbers times fixed-point weights need 53 bits."""
        levels = images.double() * 255 if self.exact else images.float() * 255
        return self._settle(levels)

    def resize(self, levels: Tensor, height: int, width: int, filter_: int) -> Tensor:
        """Side by side, in Pillow's order; a side that keeps its length is left alone."""
        first = vertical_first(*levels.shape[-2:], height, width, int(filter_))
        for dim in (-2, -1) if first else (-1, -2):
            levels = self.side(levels, dim, height if dim == -2 else width, filter_)
        return levels

    def side(self, levels: Tensor, dim: int, new: int, filter_: int) -> Tensor:
        """One pass: dimension ``dim`` (-1 or -2) to length ``new``."""
        old = levels.shape[dim]
        if old == new:
            return levels
        table = self._table(levels, old, new, filter_)
        return self._settle(levels @ table.T if dim == -1 else table @ levels)

    def _table(self, levels: Tensor, old: int, new: int, filter_: int) -> Tensor:
        table = weights(old, new, int(filter_))
        if self.exact:
            table = (table * FIXED_POINT + table.sign() / 2).trunc() / FIXED_POINT
        return table.to(levels)

    def _settle(self, levels: Tensor) -> Tensor:
        # Overshoot of the sharper filters is clipped by Pillow as well. The gradient passes: an image whose pixels
        # sit at black or white would otherwise look flat to an attacker (Athalye et al. 2018, arXiv 1802.00420).
        with torch.no_grad():
            settled = ((levels + 0.5).floor() if self.exact else levels).clamp(0, 255)
        return levels + (settled - levels).detach() if levels.requires_grad else settled
