"""Defenses against image-scaling attacks, for models that shrink images without antialiasing.

Both preserve the size of the image and need to know the model's own, ``side``; a model that pads or crops is covered
where it shrinks by the same factor. `core.images.load` with ``max_side`` is the alternative that changes the size.

The detector is after the down- and upscaling one of Quiring et al., USENIX Security 2020, but at the model's own size:
kernels that shrink a photograph agree, and those that shrink an attack do not. The aliasing of a photograph is noise
that a mean over 4 x 4 pixels removes; a hidden image is not.
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
from codefend.purifiers.detection import Detector
from codefend.types import CodefendError

_DECISIVE = 0.1  # weight from which a pixel counts as one that a kernel reads
_WIDEST = 4  # pixels; radius of the median's window at most
BLOCK = 4  # pixels of the small image
LEVEL = 0.045  # pixels in [0, 1]; `benchmarks/scaling.py calibrate`
FALSE_POSITIVES = 0.01  # at most, of crops of photographs
STEEPNESS = 8.0  # of the logit in the logarithm of the disagreement


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


# --- detection --------------------------------------------------------------------------------------------------------


def disagreement(images: Tensor, side: int) -> Tensor:
    """How far kernels without antialiasing are from area averaging at ``side``, ``[B]``, pixels in [0, 1].

    The largest, over kernels, of the RMS of the difference after a mean over 4 x 4 pixels.
    """
    size = min(side, images.shape[-2]), min(side, images.shape[-1])
    mean = resize(images, size, "area")
    block = min(BLOCK, *size)
    differences = [F.avg_pool2d(resize(images, size, kernel) - mean, block) for kernel in SPARSE]
    return torch.stack([d.square().flatten(1).mean(1) for d in differences]).amax(0).clamp_min(1e-12).sqrt()


@dataclass(frozen=True)
class KernelDetector(Detector):
    """A detector whose score depends on `disagreement` alone: 0.5 at `LEVEL`.

    >>> detector = KernelDetector.at(side=16)
    >>> flat = torch.full((1, 3, 64, 64), 0.5)
    >>> bool(detector(flat, flat) < detector.threshold)
    True
    """

    side: int = 224  # the model's own size, pixels

    @classmethod
    def at(cls, side: int) -> KernelDetector:
        return cls((), 0.0, threshold=0.5, false_positive_rate=FALSE_POSITIVES, side=side)

    def logit(self, images: Tensor, purified: Tensor) -> Tensor:
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        return STEEPNESS * (disagreement(wide, self.side) / LEVEL).log()
