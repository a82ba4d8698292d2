"""Differences of two batches of images: PSNR and SSIM, per image and differentiable.

Own code instead of torchmetrics: these are forty lines, and it takes seconds to import and brings lightning-utilities.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW = 11  # pixels


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``[B,C,H,W]`` in [0, 1] -> ``[B]``; inf where the images are equal.

    Raises ValueError when the shapes differ.
    """
    _check(a, b)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, ``[B,C,H,W]`` in [0, 1] -> ``[B]`` in [-1, 1], the mean over channels and positions.

    Gaussian window 11x11 of sigma 1.5 over the positions where it fits whole, K1 0.01, K2 0.03, data range 1.
    Raises ValueError when the shapes differ or a side is below 11 pixels.
    Source: Wang, Bovik, Sheikh, Simoncelli 2004, eq. 13.
    """
    _check(a, b)
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"ssim needs sides of {_WINDOW} pixels or more, got {tuple(a.shape[-2:])}")
    c1, c2 = 0.01**2, 0.03**2
    mu_a, mu_b = _blur(a), _blur(b)
    var_a = _blur(a * a) - mu_a * mu_a
    var_b = _blur(b * b) - mu_b * mu_b
    covariance = _blur(a * b) - mu_a * mu_b
    luminance = (2 * mu_a * mu_b + c1) / (mu_a * mu_a + mu_b * mu_b + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(images: Tensor, sigma: float = 1.5) -> Tensor:
    """Local weighted mean: the separable Gaussian window, without padding."""
    offsets = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(images.shape[1], 1, 1, 1)  # [C, 1, 1, 11]
    rows = F.conv2d(images, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=images.shape[1])


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"expected two batches [B,C,H,W] of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
