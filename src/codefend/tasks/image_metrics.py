"""Peak signal-to-noise ratio of two batches of images, per image and differentiable.

Own code instead of torchmetrics, which takes seconds to import and brings lightning-utilities.
"""

from __future__ import annotations

from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, ``[B,C,H,W]`` in [0, 1] -> ``[B]``; inf where the images are equal.

    Raises ValueError when the shapes differ.
    """
    _check(a, b)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"expected two batches [B,C,H,W] of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
