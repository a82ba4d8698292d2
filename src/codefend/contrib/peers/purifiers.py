"""The peers at test time: HGD's one residual evaluation and FlowPure's Euler steps.

ADBM and CoDefend-R change what is trained; at test time they noise and walk back by DDIM: `DiffPure` with eta 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from codefend.contrib.peers.losses import flow_purify
from codefend.core.specs import format_spec
from codefend.purifiers.base import NetPurifier
from codefend.purifiers.diffusion import per_image
from codefend.purifiers.nets import PurifierNet
from codefend.types import CodefendError


@dataclass(frozen=True)
class HgdOptions:
    """HGD has none."""


class Hgd(NetPurifier):
    """High-level guided denoiser: x - d(x), one evaluation (Liao et al. 2018, arXiv 1712.02976)."""

    evaluations = 1

    def __init__(self, net: PurifierNet, options: HgdOptions | None = None, *, name: str = "hgd") -> None:
        super().__init__(net)
        self.options, self.name = options or HgdOptions(), name

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        restored: Tensor = self.net(images, per_image(1.0, images), per_image(0.0, images))
        return restored


@dataclass(frozen=True)
class FlowOptions:
    """``noise`` is the noise that the flow was trained from, 0 for the PGD form; ``start`` the share walked back."""

    steps: int = 9
    start: float = 1.0
    noise: float = 0.0  # pixels in [0, 1]
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise CodefendError(f"flowpure steps must be 1 to 1000, got {self.steps}")
        if not 0 < self.start <= 1:
            raise CodefendError(f"flowpure start must be above 0 and at most 1, got {self.start:g}")
        if not 0 <= self.noise <= 0.6:
            raise CodefendError(f"flowpure noise must be 0 to 0.6, got {self.noise:g}")


class FlowPure(NetPurifier):
    """Euler steps along a learned flow (Collaert et al. 2025, arXiv 2505.13280); noise only in the Gaussian form."""

    def __init__(self, net: PurifierNet, options: FlowOptions | None = None, *, name: str | None = None) -> None:
        super().__init__(net)
        self.options = options = options or FlowOptions()
        self.evaluations = options.steps
        self.stochastic = options.noise > 0
        self.name = name or format_spec("flowpure", options, FlowOptions())

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        o = self.options
        return flow_purify(
            self.net,
            images,
            steps=o.steps,
            start=o.start,
            noise=o.noise,
            checkpoint=o.checkpoint,
            generator=generator,
        )
