"""The project's own purifier: a supervised diffusion bridge from adversarial to clean images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Generator, Tensor

from codefend.diffusion import bridge_purify
from codefend.nets import PurifierNet
from codefend.purifiers.base import NetPurifier, spelled
from codefend.types import UserError


@dataclass(frozen=True)
class BridgeOptions:
    """Defaults are overlaid by those saved with the weights, which know what the network was trained for."""

    evaluations: int = 1
    sigma: float = 0.0  # noise added before the first evaluation, pixels in [0, 1]
    doubt_sigma: float = 0.0  # the same for pictures that the detector suspects after a first pass; 0: no second pass
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.evaluations <= 4:
            raise UserError(f"bridge evaluations must be 1 to 4, got {self.evaluations}")
        if not 0 <= self.sigma <= 0.5:
            raise UserError(f"bridge sigma must be 0 to 0.5, got {self.sigma:g}")
        if not 0 <= self.doubt_sigma <= 0.5:
            raise UserError(f"bridge doubt_sigma must be 0 to 0.5, got {self.doubt_sigma:g}")


class Bridge(NetPurifier):
    """One to four network evaluations along the bridge; deterministic unless noise is added.

    With ``doubt_sigma`` and a detector, a picture that is suspicious after the first pass is purified again with noise:
    a clean one keeps its detail, an attacked one is restored better. (Strength that follows the picture: DiffCAP,
    arXiv 2506.03933, asks the victim's encoder for it.) The choice is hard, and an attacker who stays below the
    threshold gets the first pass: `codefend eval --set attacks=apgd:evade=10` is that attacker.
    """

    def __init__(self, net: PurifierNet, options: BridgeOptions | None = None, *, name: str | None = None) -> None:
        super().__init__(net)
        self.options = options = options or BridgeOptions()
        self.evaluations = options.evaluations
        self.stochastic = options.sigma > 0 or options.doubt_sigma > 0
        self.name = name or spelled("bridge", options, BridgeOptions())

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        purified = super().__call__(images, generator=generator)
        if not self.options.doubt_sigma or self.detector is None:
            return purified
        suspected = self.detector(images, purified) > self.detector.threshold
        if not bool(suspected.any()):
            return purified
        firmer = Bridge(self.net, replace(self.options, sigma=self.options.doubt_sigma, doubt_sigma=0.0))
        return purified.index_copy(0, suspected.nonzero()[:, 0], firmer(images[suspected], generator=generator))

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        o = self.options
        return bridge_purify(
            self.net, images, evaluations=o.evaluations, sigma=o.sigma, checkpoint=o.checkpoint, generator=generator
        )

    def cost(self, height: int, width: int) -> int:
        """Of a picture that is suspected: both passes."""
        passes = 2 if self.options.doubt_sigma and self.detector is not None else 1
        return passes * super().cost(height, width)
