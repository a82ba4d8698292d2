"""Large images, transformed in overlapping tiles, to bound the network's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
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
