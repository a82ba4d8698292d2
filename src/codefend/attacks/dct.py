"""The discrete cosine transform as a matrix product, differentiable and for any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """Orthonormal DCT-II as a matrix ``[size, size]``, row k the frequency k; its transpose is the inverse."""
    k = torch.arange(size, device=like.device, dtype=torch.float64)
    matrix = (math.pi / size * (k + 0.5) * k.unsqueeze(1)).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like.dtype)


def finite(gradient: Tensor) -> Tensor:
    """``gradient`` with zeros for the entries that are not finite, as a hook."""
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
