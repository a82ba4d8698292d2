"""DiffPure: diffuse, then denoise with an unconditional prior (Nie et al. 2022, arXiv 2205.07460)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from codefend.purifiers.base import NetPurifier
from codefend.purifiers.diffusion import diffpure, diffpure_levels
from codefend.purifiers.nets import PurifierNet
from codefend.types import CodefendError


@dataclass(frozen=True)
class DiffPureOptions:
    """``steps`` None is the paper's one step per 1/1000 of time; ``checkpoint`` saves memory in attacks, for time."""

    t: float = 0.1  # VP time; the paper's ImageNet setting is 0.15
    steps: int | None = None
    eta: float = 1.0  # 1 ancestral, 0 deterministic reverse steps (DDIM)
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.t <= 0.3:
            raise CodefendError(
                f"diffpure time t must be above 0 and at most 0.3 (the prior's training range), got {self.t:g}"
            )
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise CodefendError(f"diffpure steps must be 1 to 1000, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise CodefendError(f"diffpure eta must be 0 to 1, got {self.eta:g}")


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
        o = self.options
        return diffpure(
            self.net,
            images,
            t=o.t,
            steps=self.evaluations,
            eta=o.eta,
            noisy=not self.noise,
            checkpoint=o.checkpoint,
            generator=generator,
        )
