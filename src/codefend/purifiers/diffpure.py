"""DiffPure: diffuse, then denoise with an unconditional prior (Nie et al. 2022, arXiv 2205.07460).

The variance-preserving (VP) process of the paper runs on [-1, 1] and shrinks the image. Dividing by its scale gives the
VE form of `purifiers.nets`, and halving goes from [-1, 1] to [0, 1] (`vp_sigma`).

Sources: Song et al. 2021 (score SDE, arXiv 2011.13456), Song et al. 2021 (DDIM, arXiv 2010.02502).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from codefend.core.seeds import noise_like
from codefend.purifiers.base import NetPurifier
from codefend.purifiers.nets import Denoiser, PurifierNet, evaluate, per_image
from codefend.types import CodefendError

BETA_MIN, BETA_MAX = 0.1, 20.0  # VP SDE, score SDE eq. 32 and appendix C


@dataclass(frozen=True)
class DiffPureOptions:
    """``steps`` None is the paper's one step per 1/1000 of time; ``checkpoint`` saves memory in attacks, for time."""

    label: ClassVar[str] = "diffpure"
    limit: ClassVar[tuple[float, str]] = 0.3, " (the prior's training range)"  # the largest t, and why

    t: float = 0.1  # VP time; the paper's ImageNet setting is 0.15
    steps: int | None = None
    eta: float = 1.0  # 1 ancestral, 0 deterministic reverse steps (DDIM)
    checkpoint: bool = False

    def __post_init__(self) -> None:
        most, reason = self.limit
        if not 0 < self.t <= most:
            raise CodefendError(f"{self.label} time t must be above 0 and at most {most:g}{reason}, got {self.t:g}")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise CodefendError(f"{self.label} steps must be 1 to 1000, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise CodefendError(f"{self.label} eta must be 0 to 1, got {self.eta:g}")


class DiffPure(NetPurifier):
    """Nie et al.'s purification with our prior, differentiable through every evaluation."""

    name, kind, stochastic = "diffpure", "prior", True
    options_class, evaluations_option = DiffPureOptions, "steps"
    options: DiffPureOptions

    def __init__(self, net: PurifierNet, options: DiffPureOptions | None = None, **names: Any) -> None:
        super().__init__(net, options, **names)
        self.evaluations = self.options.steps or max(1, round(1000 * self.options.t))
        self.noise = float(diffpure_levels(self.options.t, 1)[0])
        self.noise_later = self.options.eta > 0 and self.evaluations > 1

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        """Diffuse to time ``t``, then run the reverse process (eq. 4 and 5)."""
        o, levels = self.options, diffpure_levels(self.options.t, self.evaluations)
        noisy = images + float(levels[0]) * noise_like(images, generator) if self.noise else images
        return denoise_from(self.net, noisy, levels, eta=o.eta, checkpoint=o.checkpoint, generator=generator)


def denoise_from(
    net: Denoiser,
    noisy: Tensor,
    levels: Tensor,
    *,
    eta: float = 1.0,  # 1 ancestral (DDPM), 0 deterministic (DDIM)
    checkpoint: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Run the reverse process from ``noisy`` (noise ``levels[0]``) down to ``levels[-1] = 0``; one evaluation per step.

    A step to level u < v keeps the posterior q(x_u | x_v, x_0), a Brownian bridge in VE coordinates:
    x <- x0 + (down/v)(x - x0) + up n, up = eta u sqrt(1 - u^2/v^2), down^2 = u^2 - up^2. eta = 1 is DDPM's ancestral
    sampler (the discretized reverse SDE of DiffPure), eta = 0 is DDIM (Song et al. 2021, eq. 16).
    ``checkpoint`` recomputes each evaluation in the backward pass: the memory of one step instead of all.
    """
    x = noisy
    s = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    for v, u in pairwise(levels.tolist()):
        x0 = evaluate(net, x, s, per_image(v, x), checkpoint=checkpoint)
        up = eta * u * math.sqrt(1 - (u / v) ** 2)
        x = x0 + math.sqrt(u * u - up * up) / v * (x - x0)
        if up > 0:
            x = x + up * noise_like(x, generator)
    return x


def diffpure_levels(t: float, steps: int) -> Tensor:
    """Noise levels from VP time ``t`` to 0 in ``steps`` equal steps of time, ``[steps + 1]`` (the paper: 1000 t)."""
    return vp_sigma(torch.linspace(t, 0.0, steps + 1, dtype=torch.float64))


def vp_log_mean(t: Tensor) -> Tensor:
    """Log of the VP process' mean coefficient at time ``t`` in [0, 1]; alpha_bar = exp(2 * it) (score SDE, eq. 33)."""
    return -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN


def vp_sigma(t: Tensor) -> Tensor:
    """Noise level of VP time ``t`` in [0, 1] pixels: sqrt((1 - alpha_bar) / alpha_bar) / 2."""
    return 0.5 * torch.expm1(-2 * vp_log_mean(t)).sqrt()
