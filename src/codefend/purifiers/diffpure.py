"""DiffPure: diffuse, then denoise with an unconditional prior (Nie et al. 2022, arXiv 2205.07460)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from codefend.purifiers.base import NetPurifier
from codefend.purifiers.diffusion import diffpure
from codefend.purifiers.nets import PurifierNet
from codefend.types import CodefendError


@dataclass(frozen=True)
class DiffPureOptions:
    """``steps`` None is the paper's one step per 1/1000 of time; ``checkpoint`` trades time for attack memory."""

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
    """The re-implemented baseline on our own prior; exact gradients through every evaluation."""

    name, stochastic = "diffpure", True
    evaluations_option = "steps"
    options: DiffPureOptions

    def __init__(self, net: PurifierNet, options: DiffPureOptions | None = None, **naming: Any) -> None:
        options = options or DiffPureOptions()
        super().__init__(net, options, **naming)
        self.evaluations = options.steps or max(1, round(1000 * options.t))

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        o = self.options
        return diffpure(
            self.net, images, t=o.t, steps=self.evaluations, eta=o.eta, checkpoint=o.checkpoint, generator=generator
        )
