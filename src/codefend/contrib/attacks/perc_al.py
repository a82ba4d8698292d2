"""PerC-AL: a bound on perceived colour instead of pixel values (Zhao, Liu & Larson 2020, arXiv 1911.02466)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import choose, direction, random_signs, spread
from codefend.types import Budget, Objective

ROUNDING = 0.5  # CIEDE2000 that 8 bits may add, dark pixels most
_BISECTIONS = 12  # halvings of the shrink factor: 1/4096 of it


def colour_distance(images: Tensor, clean: Tensor) -> Tensor:
    """Root mean square CIEDE2000 over the pixels, ``[B]``: the paper's C_2 over the square root of their number."""
    difference = ciede2000(lab(clean), lab(images))
    return difference.square().flatten(1).mean(1).sqrt()


def shrink(images: Tensor, clean: Tensor, limit: float) -> Tensor:
    """Move images outside the bound along the straight line to ``clean`` until they are ``limit`` away in colour."""
    inside = colour_distance(images, clean) <= limit
    low = torch.zeros(len(clean), dtype=clean.dtype, device=clean.device)
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        if bool(inside.all()):
            return images
        middle = (low + high) / 2
        fits = colour_distance(clean + spread(middle, clean) * (images - clean), clean) <= limit
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return choose(inside, images, clean + spread(low, clean) * (images - clean))


@dataclass(kw_only=True)
class PerCAL(ImageAttack):
    """Inside the bound a step down the objective, outside it a step back in colour; the best inside is returned.

    ``budget.norm`` and ``eps`` do not apply. The paper alternates on whether the image fools the classifier and
    minimizes the distance; here the reverse, the lowest objective within a distance. Step lengths are the
    paper's two, scaled from its l2 lengths at 299 px to root mean square per pixel.
    """

    limit: float = 2.3  # root mean square CIEDE2000; 2.3 is the just noticeable difference of Mahy et al. 1994
    step_size: float = 2 / 255  # of the objective's step, root mean square per pixel; falls linearly to a tenth
    back: float = 0.5  # length of the step back, share of ``step_size``
    name: str = "perc-al"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best = self.best_of(objective, clean, budget.eot)
        # At the clean image itself a feature objective and the colour distance have no slope.
        x = (clean + random_signs(clean, generator) * self.step_size / 10).clamp(0, 1)
        scale = clean[0].numel() ** 0.5
        for step in range(budget.steps):
            losses, grad = self.gradient(objective, x, budget.eot, step)
            inside, outward = self._colour(x, clean)
            best.update(x, torch.where(inside, losses, torch.full_like(losses, torch.nan)))
            rate = self.step_size * (1 - 0.9 * step / budget.steps) * scale
            down, home = rate * direction(grad, "l2"), rate * self.back * direction(outward, "l2")
            x = (x - choose(inside, down, home)).clamp(0, 1)
        last = shrink(x, clean, self.limit)
        best.update(last, self.score(objective, last, budget.eot, budget.steps))
        return self.select(best, objective, last, budget)

    def _colour(self, x: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Which images are inside the bound ``[B]``, and the gradient of the colour distance."""
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            distances = colour_distance(leaf, clean)
            (grad,) = torch.autograd.grad(distances.sum(), leaf)
        return distances.detach() <= self.limit, torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """CIEDE2000 beyond the limit, ``[B]``."""
        return (colour_distance(images, clean) - self.limit - ROUNDING).clamp_min(0)


# --- CIEDE2000 (CIE 142-2001; equation numbers of Sharma, Wu & Dalal 2005), differentiable ----------------------------

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
