"""Balls of radius eps around a clean image, cut by the pixel box [0, 1]: distance, projection, steps, 8-bit rounding.

Images are ``[B, 3, H, W]`` in ``[0, 1]``; eps and step sizes are in the same units. Every function treats each example
on its own, and no function needs a gradient.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from codefend.core.images import quantize8
from codefend.core.seeds import noise_like
from codefend.types import Budget

Norm = Literal["linf", "l2"]

_LEVELS = 255  # the steps of an 8-bit channel
_SLACK = 1e-4  # 8-bit steps; float32 cannot say k/255 exactly
_BISECTIONS = 20  # halvings of the shrink factor: 1e-6 of it


def spread(values: Tensor, like: Tensor) -> Tensor:
    """One number per example ``[B]``, shaped to multiply ``like`` ``[B, ...]``."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``yes`` for the examples where ``mask`` ``[B]`` holds, ``no`` for the others."""
    return torch.where(mask.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def length(delta: Tensor, norm: Norm) -> Tensor:
    """Norm of each example, ``[B]``; scaled by the largest entry first, so that it neither over- nor underflows."""
    flat = delta.flatten(1)
    top = flat.abs().amax(1)
    if norm == "linf":
        return top
    safe = top.clamp_min(torch.finfo(delta.dtype).tiny)
    scaled: Tensor = torch.linalg.vector_norm(flat / safe.unsqueeze(1), dim=1)
    return scaled * safe


def distance(images: Tensor, clean: Tensor, norm: Norm) -> Tensor:
    """How far each image is from its clean one, ``[B]``, in pixel units."""
    return length(images - clean, norm)


def project(images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """Nearest point of the ball, then of the pixel box: ``clean`` is in the box, so clipping only brings it closer."""
    delta = images - clean
    if budget.norm == "linf":
        delta = delta.clamp(-budget.eps, budget.eps)
    else:
        size = length(delta, "l2").clamp_min(torch.finfo(delta.dtype).tiny)
        delta = delta * spread((budget.eps / size).clamp_max(1.0), delta)
    return (clean + delta).clamp(0.0, 1.0)


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent of unit norm: the sign for l-inf, the normalized gradient for l2; zero where it is zero."""
    if norm == "linf":
        return gradient.sign()
    return gradient / spread(length(gradient, "l2").clamp_min(torch.finfo(gradient.dtype).tiny), gradient)


def descend(images: Tensor, gradient: Tensor, step: float | Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """One steepest step of length ``step`` (a number or ``[B]``) that lowers the objective, back inside the ball."""
    size = spread(step, images) if isinstance(step, Tensor) else step
    return project(images - size * direction(gradient, budget.norm), clean, budget)


class Adam:
    """Adam's direction (Kingma & Ba 2015, Algorithm 1), entry by entry, so that its state is per example.

    ``torch.optim.Adam`` computes the same after seconds of imports.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.betas, self.steps = betas, 0
        self.mean = self.square = torch.zeros(())

    def __call__(self, grad: Tensor) -> Tensor:
        """The next direction of ascent, about 1 per entry: bias-corrected mean over root mean square."""
        first, second = self.betas
        self.steps += 1
        self.mean = first * self.mean.to(grad) + (1 - first) * grad
        self.square = second * self.square.to(grad) + (1 - second) * grad.square()
        mean, square = self.mean / (1 - first**self.steps), self.square / (1 - second**self.steps)
        return mean / (square.sqrt() + 1e-12)


def pixel_scale(clean: Tensor, budget: Budget) -> float:
    """Mean change of a pixel at the edge of the ball: eps for l-inf, eps / sqrt(number of values) for l2."""
    return budget.eps if budget.norm == "linf" else budget.eps / clean[0].numel() ** 0.5


def uniform(like: Tensor, generator: Generator | None = None, *, shape: tuple[int, ...] | None = None) -> Tensor:
    """Uniform in [0, 1), drawn where the generator lives, with the dtype and device of ``like``."""
    device = like.device if generator is None else generator.device
    size = tuple(like.shape) if shape is None else shape
    return torch.rand(size, generator=generator, device=device, dtype=like.dtype).to(like.device)


def random_signs(like: Tensor, generator: Generator | None = None, *, shape: tuple[int, ...] | None = None) -> Tensor:
    """-1 or 1 with equal chance, with the dtype and device of ``like``."""
    return (uniform(like, generator, shape=shape) < 0.5).to(like.dtype) * 2 - 1


def random_start(clean: Tensor, budget: Budget, *, generator: Generator | None = None) -> Tensor:
    """Uniform in the ball (before the pixel box cuts it), ``[B, 3, H, W]``."""
    if budget.norm == "linf":
        return project(clean + budget.eps * (2 * uniform(clean, generator) - 1), clean, budget)
    # A uniform point of a d-ball: a uniform direction at radius u^(1/d).
    radius = uniform(clean, generator, shape=(len(clean),)) ** (1 / clean[0].numel())
    return project(
        clean + spread(budget.eps * radius, clean) * direction(noise_like(clean, generator), "l2"), clean, budget
    )


def quantize_in_budget(images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """Round to 8 bits as an upload does, yet stay inside the ball (and within 1e-6 of it in float32).

    l-inf: each value takes the nearest 8-bit value inside its interval. l2: the perturbation is shrunk until its
    rounded form fits. Where no 8-bit value fits because ``clean`` itself is off the 8-bit grid, the rounded clean
    value is returned: the budget then counts from the clean image as it would be uploaded.
    """
    rounded_clean = _snap(clean)
    if budget.norm == "linf":
        low = ((clean - budget.eps) * _LEVELS - _SLACK).ceil().clamp(0, _LEVELS)
        high = ((clean + budget.eps) * _LEVELS + _SLACK).floor().clamp(0, _LEVELS)
        inside = torch.minimum(torch.maximum((images * _LEVELS).round(), low), high) / _LEVELS
        return torch.where(low <= high, inside, rounded_clean)
    limit = budget.eps * (1 + 1e-6) + 1e-7
    best, delta = rounded_clean, images - clean
    fits = torch.zeros(len(clean), dtype=clean.dtype, device=clean.device)  # the largest factor known to fit
    fails = torch.ones_like(fits)
    factor = torch.ones_like(fits)
    for _ in range(_BISECTIONS):
        trial = _snap(clean + spread(factor, delta) * delta)
        ok = distance(trial, clean, "l2") <= limit
        best = choose(ok, trial, best)
        if bool((ok & (factor == 1)).all()):
            break
        fits, fails = torch.where(ok, factor, fits), torch.where(ok, fails, factor)
        factor = (fits + fails) / 2
    return best


def _snap(images: Tensor) -> Tensor:
    return (images * _LEVELS).round().clamp(0, _LEVELS) / _LEVELS


# --- attacks with a bound of their own (a patch, a flow, a colour distance): nothing else needs special cases ---------


@runtime_checkable
class OwnBound(Protocol):
    """An attack that ignores ``Budget.norm`` and ``Budget.eps``."""

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """How far each image exceeds the attack's own bound, ``[B]``: 0 inside it, with a tolerance for 8 bits."""


def quantize_attacked(attack: object, images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """Attacked images as 8-bit uploads: inside the ball, unless the attack has its own bound."""
    if isinstance(attack, OwnBound):
        return quantize8(images)
    return quantize_in_budget(images, clean, budget)


def excess(attack: object, images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """How far each image is outside the pixel box or the attack's bound, ``[B]``; inf where it is not finite."""
    flat = images.flatten(1)
    box = torch.maximum(-flat.amin(1), flat.amax(1) - 1)
    if isinstance(attack, OwnBound):
        over = attack.outside(images, clean)
    else:
        over = distance(images, clean, budget.norm) - budget.eps
    worst = torch.maximum(box, over).clamp_min(0)
    return torch.where(flat.isfinite().all(1), worst, torch.full_like(worst, torch.inf))
