"""Input transformations without a network: baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.purifiers.base import Purifier
from codefend.types import CodefendError


class Identity(Purifier):
    """No defense: the control."""

    name = "identity"

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        return images


@dataclass(frozen=True)
class JpegOptions:
    quality: int = 75  # 1 to 100; 75 as in Das et al. 2018

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise CodefendError(f"jpeg quality must be 1 to 100, got {self.quality}")


class Jpeg(Purifier):
    """JPEG compression without chroma subsampling (Das et al. 2018, SHIELD, arXiv 1802.06816)."""

    name = "jpeg"
    differentiable = False
    tiled = False  # the codec's 8x8 grid starts at the image's corner
    options_class = JpegOptions
    options: JpegOptions

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        from codefend.core.images import encode, load

        files = [encode(image, "JPEG", quality=self.options.quality) for image in images.detach()]
        pixels = images.shape[-2] * images.shape[-1]
        return torch.stack([load(file, max_pixels=pixels).pixels for file in files]).to(images)


@dataclass(frozen=True)
class BitDepthOptions:
    bits: int = 5  # per colour; 5 as in Xu et al. for ImageNet
    median: int = 3  # side of the median filter that follows, odd, pixels; 1 is none

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CodefendError(f"bits must be 1 to 8, got {self.bits}")
        _check_odd(self.median)


class BitDepth(Purifier):
    """Fewer bits per colour, then a median filter (Xu et al. 2018, Feature Squeezing, arXiv 1704.01155)."""

    name = "bitdepth"
    differentiable = False
    options_class = BitDepthOptions
    options: BitDepthOptions

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        levels = 2**self.options.bits - 1
        return median_filter((images.clamp(0, 1) * levels).round() / levels, self.options.median)


@dataclass(frozen=True)
class MedianOptions:
    size: int = 3  # side of the window, odd, pixels

    def __post_init__(self) -> None:
        _check_odd(self.size)


class Median(Purifier):
    """Median filter over a square window, per colour (Xu et al. 2018, arXiv 1704.01155)."""

    name = "median"
    options_class = MedianOptions
    options: MedianOptions

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        return median_filter(images, self.options.size)


@dataclass(frozen=True)
class BlurOptions:
    sigma: float = 1.0  # pixels

    def __post_init__(self) -> None:
        if not 0 < self.sigma <= 20:
            raise CodefendError(f"blur sigma must be above 0 and at most 20 pixels, got {self.sigma:g}")


class Blur(Purifier):
    """Gaussian blur with the kernel truncated at four standard deviations."""

    name = "blur"
    options_class = BlurOptions
    options: BlurOptions

    def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
        radius = int(4 * self.options.sigma + 0.5)
        offset = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-0.5 * (offset / self.options.sigma) ** 2)
        kernel = (kernel / kernel.sum()).expand(3, 1, -1)
        padded = F.pad(images, (radius,) * 4, mode="replicate")
        rows = F.conv2d(padded, kernel[:, :, None, :], groups=3)
        return F.conv2d(rows, kernel[:, :, :, None], groups=3)


def median_filter(images: Tensor, size: int) -> Tensor:
    """Median over ``size`` x ``size`` windows of each colour with replicated borders, ``[B,3,H,W]``; differentiable."""
    if size == 1:
        return images
    padded = F.pad(images, (size // 2,) * 4, mode="replicate")
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).flatten(4)  # [B,3,H,W,size^2]
    return windows.median(-1).values


def _check_odd(size: int) -> None:
    if size not in (1, 3, 5, 7):
        raise CodefendError(f"the median window must be 1, 3, 5 or 7 pixels wide, got {size}")
