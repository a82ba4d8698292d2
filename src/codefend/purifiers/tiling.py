"""Large pictures: in overlapping tiles, so that memory does not grow with the network's work, or shrunk for servers."""

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
    """As `blend`, for a ``transform`` from a tile's place to what belongs there in a picture like ``image``."""
    total, weights = torch.zeros_like(image), torch.zeros_like(image[:, :1])
    height, width = image.shape[-2:]
    for top, bottom, left, right in grid.boxes(height, width):
        rows = torch.tensor(grid.ramp(top, bottom, height))
        weight = rows.outer(torch.tensor(grid.ramp(left, right, width))).to(image)
        part = transform((top, bottom, left, right))
        total[..., top:bottom, left:right] += part * weight
        weights[..., top:bottom, left:right] += weight
    return total / weights


def limit_side(pixels: Tensor, longest: int | None) -> Tensor:
    """Shrink ``[C, H, W]`` in [0, 1] so that no side is over ``longest``: antialiased, aspect kept to the pixel.

    For servers, whose models shrink pictures anyway. The shrunk picture must also be what the model is then given:
    purifying a small copy and enlarging it would bring back nothing, and patching a large one leaves the attack in.
    """
    height, width = pixels.shape[-2:]
    if longest is None or max(height, width) <= longest:
        return pixels
    scale = longest / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
