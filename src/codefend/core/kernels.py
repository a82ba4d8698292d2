"""The interpolation kernels by which libraries shrink images, and their matrices.

| kernel | torch `interpolate` | Pillow | OpenCV |
|---|---|---|---|
| nearest | nearest | - | INTER_NEAREST |
| nearest-exact | nearest-exact | NEAREST | INTER_NEAREST_EXACT |
| bilinear, bicubic | the same, antialias=False | - | INTER_LINEAR, INTER_CUBIC |
| area | area | BOX (whole ratios) | INTER_AREA (whole ratios) |
| bilinear-antialias, bicubic-antialias | the same, antialias=True | BILINEAR, BICUBIC | - |

Every kernel is linear and separable: ``small = R image Cᵀ`` for each colour.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "area", "bilinear-antialias", "bicubic-antialias"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
SPARSE: tuple[Kernel, ...] = KERNELS[:4]  # read a fixed number of pixels, however many there are


def resize(images: Tensor, size: tuple[int, int], kernel: Kernel) -> Tensor:
    """``[B, C, H, W]`` at ``size`` (height, width), by ``kernel``; bicubic overshoots are not clipped."""
    mode = kernel.removesuffix("-antialias")
    corners = None if mode in ("nearest", "nearest-exact", "area") else False
    return F.interpolate(images, size, mode=mode, align_corners=corners, antialias=kernel.endswith("antialias"))


def matrix(kernel: Kernel, length: int, target: int) -> Tensor:
    """The kernel along one axis, ``[target, length]`` float64: each row weights the pixels that one output reads."""
    impulses = torch.eye(length, dtype=torch.float64)[None, None]  # each column lights one pixel
    return resize(impulses, (target, length), kernel)[0, 0]
