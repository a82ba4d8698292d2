"""CIEDE2000 colour difference, differentiable (CIE 142-2001; equation numbers of Sharma, Wu & Dalal 2005).

``[B, 3, H, W]`` in and ``[B, H, W]`` out; 1 is about the just noticeable difference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# sRGB (IEC 61966-2-1) to XYZ, divided by the white of D65
_TO_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)
_TINY = 1e-12  # under square roots: their slope at 0 is infinite
_FULL = 2 * math.pi


def lab(images: Tensor) -> Tensor:
    """CIELAB under D65, ``[B, 3, H, W]``, L* in [0, 100]."""
    linear = torch.where(images <= 0.04045, images / 12.92, ((images.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,bjhw->bihw", images.new_tensor(_TO_XYZ), linear)
    edge = (6 / 29) ** 3
    f = torch.where(xyz > edge, xyz.clamp_min(edge) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def ciede2000(first: Tensor, second: Tensor) -> Tensor:
    """Colour difference of two CIELAB images, pixel by pixel, ``[B, H, W]``; the weights k_L, k_C, k_H are 1."""
    (l1, a1, b1), (l2, a2, b2) = first.unbind(1), second.unbind(1)
    mean_c = (_hypot(a1, b1) + _hypot(a2, b2)) / 2
    g = 0.5 * (1 - _saturation(mean_c))  # 4
    a1, a2 = (1 + g) * a1, (1 + g) * a2  # 5
    c1, c2 = _hypot(a1, b1), _hypot(a2, b2)  # 6
    h1, h2 = _hue(a1, b1), _hue(a2, b2)  # 7
    grey = (c1 * c2) < 1e-8
    turn = h2 - h1
    turn = turn - _FULL * (turn > math.pi).to(turn) + _FULL * (turn < -math.pi).to(turn)
    turn = torch.where(grey, torch.zeros_like(turn), turn)  # 10
    dl, dc, dh = l2 - l1, c2 - c1, 2 * (c1 * c2 + _TINY).sqrt() * (turn / 2).sin()  # 8, 9, 11
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2  # 12, 13
    far = ((h1 - h2).abs() > math.pi) & ~grey
    total = h1 + h2
    mean_h = torch.where(far, (total + torch.where(total < _FULL, _FULL, -_FULL)) / 2, total / 2)
    mean_h = torch.where(grey, total, mean_h)  # 14
    s_l, s_c, s_h = _weights(mean_l, mean_c, mean_h)
    l_part, c_part, h_part = dl / s_l, dc / s_c, dh / s_h
    squared = l_part**2 + c_part**2 + h_part**2 + _rotation(mean_c, mean_h) * c_part * h_part  # 22
    return (squared.clamp_min(0) + _TINY).sqrt()


def _weights(l: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """S_L, S_C and S_H (18 to 20) with T (15)."""
    away = (l - 50).square()
    t = 1 - 0.17 * (h - math.radians(30)).cos() + 0.24 * (2 * h).cos()
    t = t + 0.32 * (3 * h + math.radians(6)).cos() - 0.20 * (4 * h - math.radians(63)).cos()
    return 1 + 0.015 * away / (20 + away).sqrt(), 1 + 0.045 * c, 1 + 0.015 * c * t


def _rotation(c: Tensor, h: Tensor) -> Tensor:
    """R_T (16, 17, 21): chroma and hue interact in the blue."""
    theta = math.radians(30) * (-(((h - math.radians(275)) / math.radians(25)) ** 2)).exp()
    return -(2 * theta).sin() * 2 * _saturation(c)


def _saturation(c: Tensor) -> Tensor:
    powered = c**7
    return (powered / (powered + 25.0**7) + _TINY).sqrt()


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    return (a * a + b * b + _TINY).sqrt()


def _hue(a: Tensor, b: Tensor) -> Tensor:
    """Angle in [0, 2 pi), 0 for grey, where it has no slope."""
    grey = (a * a + b * b) < _TINY
    angle = torch.atan2(torch.where(grey, torch.zeros_like(b), b), torch.where(grey, torch.ones_like(a), a))
    return angle + _FULL * (angle < 0).to(angle)
