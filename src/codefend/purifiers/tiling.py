"""Large images: transformed in overlapping tiles, to bound the network's memory, or shrunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.purifiers import grid


def blend(transform: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Apply ``transform`` (same shape out as in) to ``[1, C, H, W]`` tile by tile (see `grid`)."""
    return blend_boxes(lambda box: transform(image[..., box[0] : box[1], box[2] : box[3]]), image)


def blend_boxes(transform: Callable[[grid.Box], Tensor], image: Tensor) -> Tensor:
    """As `blend`, for a ``transform`` from a tile's box to its output ``[1, C, h, w]``; ``image`` gives the size."""
    total, weights = torch.zeros_like(image), torch.zeros_like(image[:, :1])
    height, width = image.shape[-2:]
    for top, bottom, left, right in grid.boxes(height, width):
        rows = torch.tensor(grid.ramp(top, bottom, height))
        weight = rows.outer(torch.tensor(grid.ramp(left, right, width))).to(image)
        output = transform((top, bottom, left, right))
        total[..., top:bottom, left:right] += output * weight
        weights[..., top:bottom, left:right] += weight
    return total / weights


def limit_side(pixels: Tensor, longest: int | None) -> Tensor:
    """Shrink ``[C, H, W]`` in [0, 1] so that no side is over ``longest``: antialiased, with the aspect ratio preserved.

    The model must then get the shrunk image: the purified detail of a small copy cannot be put back into a large image.
    """
    height, width = pixels.shape[-2:]
    if longest is None or max(height, width) <= longest:
        return pixels
    scale = longest / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
