"""Controls without an adversary: common corruptions (Hendrycks & Dietterich 2019, arXiv 1903.12261), and noise.

Strengths are the benchmark's for ImageNet; lengths in pixels are scaled from its 224 px to the shorter side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor
from torch.nn.functional import conv2d, interpolate, pad

from codefend.attacks.base import ImageAttack
from codefend.attacks.norms import random_start, uniform
from codefend.core.seeds import noise_like
from codefend.types import Budget, CodefendError, Objective

Kind = Literal[
    "worst",
    "gaussian-noise",
    "shot-noise",
    "impulse-noise",
    "speckle-noise",
    "gaussian-blur",
    "defocus-blur",
    "motion-blur",
    "brightness",
    "contrast",
    "saturate",
    "pixelate",
]
KINDS: tuple[str, ...] = get_args(Kind)[1:]
_SIDE = 224  # pixels; the benchmark's images
_LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian-noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot-noise": (60, 25, 12, 5, 3),  # photons per unit
    "impulse-noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of the values
    "speckle-noise": (0.15, 0.2, 0.35, 0.45, 0.6),  # standard deviation per unit
    "gaussian-blur": (1, 2, 3, 4, 6),  # sigma, pixels
    "defocus-blur": (3, 4, 6, 8, 10),  # radius of the disk, pixels
    "motion-blur": (3, 5, 8, 8, 10),  # sigma along the line, pixels
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to HSV's value
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # share kept
    "saturate": (0.3, 0.1, 2, 5, 20),  # factor of HSV's saturation
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # share of the side kept
}


def corrupt(images: Tensor, kind: str, severity: int, *, generator: Generator | None = None) -> Tensor:
    """Corrupt ``images`` at ``severity`` 1 to 5, in [0, 1]. Raises CodefendError for another kind or severity."""
    if kind not in KINDS or not 1 <= severity <= 5:
        raise CodefendError(
            f"no corruption {kind!r} at severity {severity}; kinds: {', '.join(KINDS)}; severity 1 to 5"
        )
    level = _LEVELS[kind][severity - 1]
    damaged = _NOISES[kind](images, level, generator) if kind in _NOISES else _DAMAGES[kind](images, level)
    return damaged.clamp(0, 1)


def _shot(images: Tensor, photons: float, generator: Generator | None) -> Tensor:
    # torch.poisson draws on the CPU generator's device only, like every draw here.
    device = images.device if generator is None else generator.device
    return torch.poisson((images * photons).to(device), generator=generator).to(images) / photons


def _impulse(images: Tensor, share: float, generator: Generator | None) -> Tensor:
    draw = uniform(images, generator)
    pepper, salt = draw < share / 2, draw > 1 - share / 2
    return images.masked_fill(pepper, 0.0).masked_fill(salt, 1.0)


_NOISES: dict[str, Callable[[Tensor, float, Generator | None], Tensor]] = {
    "gaussian-noise": lambda x, level, g: x + level * noise_like(x, g),
    "shot-noise": _shot,
    "impulse-noise": _impulse,
    "speckle-noise": lambda x, level, g: x + x * level * noise_like(x, g),
}


def _scaled(images: Tensor, pixels: float) -> float:
    return pixels * min(images.shape[-2:]) / _SIDE


def _convolve(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel with one kernel of odd sides that sums to 1; edges repeated."""
    kernel = (kernel / kernel.sum()).to(images)
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = pad(images, (columns, columns, rows, rows), mode="replicate")
    return conv2d(padded, kernel.expand(3, 1, *kernel.shape), groups=3)


def _bell(sigma: float) -> Tensor:
    reach = max(math.ceil(3 * sigma), 1)
    return (-(torch.arange(-reach, reach + 1).double() ** 2) / (2 * max(sigma, 1e-3) ** 2)).exp()


def _gaussian_blur(images: Tensor, pixels: float) -> Tensor:
    bell = _bell(_scaled(images, pixels))
    return _convolve(_convolve(images, bell[:, None]), bell[None])


def _defocus(images: Tensor, pixels: float) -> Tensor:
    radius = _scaled(images, pixels)
    reach = max(math.ceil(radius), 1)
    line = torch.arange(-reach, reach + 1).double()
    from_centre = (line[:, None] ** 2 + line[None] ** 2).sqrt()
    return _convolve(images, (radius + 0.5 - from_centre).clamp(0, 1))  # a disk with a soft rim


def _motion(images: Tensor, pixels: float) -> Tensor:
    bell = _bell(_scaled(images, pixels))
    bell[: len(bell) // 2] = 0  # the shutter opens once: a trail to one side
    return _convolve(images, bell[None])


def _hsv_change(images: Tensor, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Change saturation and value and keep the hue: a colour is value * (1 - saturation * share of its channel)."""
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    span = value - low
    share = (value - images) / span.clamp_min(1e-6)
    new_saturation, new_value = change(span / value.clamp_min(1e-6), value)
    return new_value.clamp(0, 1) * (1 - new_saturation.clamp(0, 1) * share)


def _pixelate(images: Tensor, share: float) -> Tensor:
    height, width = images.shape[-2:]
    small = interpolate(images, (max(int(height * share), 1), max(int(width * share), 1)), mode="area")
    return interpolate(small, (height, width), mode="nearest")


_DAMAGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian-blur": _gaussian_blur,
    "defocus-blur": _defocus,
    "motion-blur": _motion,
    "brightness": lambda x, level: _hsv_change(x, lambda s, v: (s, v + level)),
    "contrast": lambda x, level: level * x + (1 - level) * x.mean((2, 3), keepdim=True),
    "saturate": lambda x, level: _hsv_change(x, lambda s, v: (s * level, v)),
    "pixelate": _pixelate,
}


@dataclass(kw_only=True)
class Corruption(ImageAttack):
    """One corruption, or per example the worst of all kinds and the clean image. ``budget`` does not apply."""

    kind: Kind = "worst"
    severity: int = 3  # 1 to 5
    name: str = "corruption"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        last = clean
        if self.kind != "worst":
            last = corrupt(clean, self.kind, self.severity, generator=generator)
            self.score(objective, last, budget.eot, 0)
            return last
        best = self.best_of(objective, clean, budget.eot)
        for number, kind in enumerate(KINDS):
            last = corrupt(clean, kind, self.severity, generator=generator)
            best.update(last, self.score(objective, last, budget.eot, number))
        return self.select(best, objective, last, budget)

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """0 for each image: corruptions are not bounded."""
        return torch.zeros(len(clean), dtype=clean.dtype, device=clean.device)


@dataclass(kw_only=True)
class RandomNoise(ImageAttack):
    """The best of a few uniform draws and the clean image; ``budget.steps`` has no effect."""

    draws: int = 10  # independent draws, best per example
    name: str = "noise"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best, last = self.best_of(objective, clean, budget.eot), clean
        for draw in range(self.draws):
            last = random_start(clean, budget, generator=generator)
            best.update(last, self.score(objective, last, budget.eot, draw))
        return self.select(best, objective, last, budget)
