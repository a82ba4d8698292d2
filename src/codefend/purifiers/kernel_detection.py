"""Detection of image-scaling attacks: kernels that shrink a photograph agree, and those that shrink an attack do not.

After the down- and upscaling detector of Quiring et al., USENIX Security 2020, but at the model's own size, where the
difference is an image of its own: aliasing of a photograph is noise that a mean over 4 x 4 pixels removes, and a hidden
image is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core.kernels import SPARSE, resize
from codefend.purifiers.detection import Detector

BLOCK = 4  # pixels of the small image
LEVEL = 0.045  # pixels in [0, 1]; `benchmarks/scaling.py calibrate`
FALSE_POSITIVES = 0.01  # at most, of crops of photographs
STEEPNESS = 8.0  # of the logit in the logarithm of the disagreement


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
