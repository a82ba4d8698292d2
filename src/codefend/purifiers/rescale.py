"""Defenses against image-scaling attacks, for models that shrink images without antialiasing.

Both preserve the size of the image and need to know the model's own, ``side``; a model that pads or crops is covered
where it shrinks by the same factor. `core.images.load` with ``max_side`` is the alternative that changes the size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.core.kernels import SPARSE, matrix, resize
from codefend.purifiers.base import Purifier
from codefend.purifiers.kernel_detection import KernelDetector
from codefend.types import CodefendError

_DECISIVE = 0.1  # weight from which a pixel counts as one that a kernel reads
_WIDEST = 4  # pixels; radius of the median's window at most


@dataclass(frozen=True)
class RescaleOptions:
    side: int = 224  # to which the model shrinks each side of an image, pixels
    gate: bool = False  # return images unchanged on which the kernels agree

    def __post_init__(self) -> None:
        if not 8 <= self.side <= 8192:
            raise CodefendError(f"side must be 8 to 8192 pixels, got {self.side}")


class _Rescaling(Purifier):
    tiled = False  # the model's grid spans the image
    options_class = RescaleOptions
    options: RescaleOptions

    def __init__(self, options: RescaleOptions | None = None, *, name: str | None = None, defaults: Any = None) -> None:
        super().__init__(options, name=name, defaults=defaults)
        self.gate, self.detector = self.options.gate, KernelDetector.at(self.options.side)


class Area(_Rescaling):
    """Each block of pixels that one pixel of the model's stands for becomes its mean, in the image's own size.

    Any kernel then reads means in which all pixels count alike.
    """

    name = "area"

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        height, width = images.shape[-2:]
        small = resize(images, (min(height, self.options.side), min(width, self.options.side)), "area")
        return resize(small, (height, width), "nearest-exact")


class ScalingMedian(_Rescaling):
    """Pixels that decide what a kernel reads become the median of those around that no kernel reads.

    The selective median of Quiring et al. 2020, sec. 4.2, for every kernel at a time. Where kernels read all pixels,
    at factors under 3, nothing can be told from around and the pixels stay.
    """

    name = "scaling-median"

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        read = read_pixels(images.shape[-2], images.shape[-1], self.options.side).to(images.device)
        if not read.any() or read.all():
            return images
        radius = min(_WIDEST, math.ceil(max(images.shape[-2:]) / self.options.side / 2))
        known = F.pad(images.masked_fill(read, torch.nan), (radius,) * 4, value=torch.nan)
        windows = known.unfold(2, 2 * radius + 1, 1).unfold(3, 2 * radius + 1, 1)  # a view [B,3,H,W,k,k]
        medians = windows[:, :, read].flatten(3).nanmedian(-1).values
        restored = images.clone()
        restored[:, :, read] = torch.where(medians.isnan(), images[:, :, read], medians)
        return restored


def read_pixels(height: int, width: int, side: int) -> Tensor:
    """The pixels that some kernel without antialiasing reads with a weight of 0.1 or more, bool ``[H, W]``."""
    rows, columns = min(height, side), min(width, side)
    read = torch.zeros(height, width, dtype=torch.bool)
    for kernel in SPARSE if (rows, columns) != (height, width) else ():
        along = [matrix(kernel, n, m).abs().amax(0) >= _DECISIVE for n, m in ((height, rows), (width, columns))]
        read |= along[0][:, None] & along[1]
    return read
