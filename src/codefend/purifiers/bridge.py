"""The project's own purifier: a supervised diffusion bridge from adversarial to clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from codefend.purifiers.base import NetPurifier
from codefend.purifiers.diffusion import bridge_purify
from codefend.purifiers.guidance import Guidance, encoder_names
from codefend.purifiers.nets import PurifierNet
from codefend.types import CodefendError


@dataclass(frozen=True)
class BridgeOptions:
    """Defaults are overlaid by those saved with the weights, which know what the network was trained for."""

    evaluations: int = 1
    sigma: float = 0.0  # noise added before the first evaluation, pixels in [0, 1]
    checkpoint: bool = False
    strength: float = 1.0  # of the change that is made; under 1 keeps more of the picture, above 1 goes further
    gate: bool = False  # let pictures pass as they are that the weights' detector finds clean
    guided: float = 0.0  # how far to go on, away from the attacked picture's features, see `Guidance`; 0.2 is tried
    guides: str = "lite0+lite2"  # the encoders whose features these are

    def __post_init__(self) -> None:
        if not 1 <= self.evaluations <= 4:
            raise CodefendError(f"bridge evaluations must be 1 to 4, got {self.evaluations}")
        if not 0 <= self.sigma <= 0.5:
            raise CodefendError(f"bridge sigma must be 0 to 0.5, got {self.sigma:g}")
        if not 0 < self.strength <= 1.5:
            raise CodefendError(f"bridge strength must be above 0, to 1.5, got {self.strength:g}")
        if not 0 <= self.guided <= 1:
            raise CodefendError(f"bridge guided must be 0 to 1, got {self.guided:g}")
        encoder_names(self.guides)


class Bridge(NetPurifier):
    """One to four network evaluations along the bridge; deterministic unless ``sigma`` adds noise first."""

    name = "bridge"
    after_network = ("gate", "guided", "guides")
    options: BridgeOptions

    def __init__(self, net: PurifierNet, options: BridgeOptions | None = None, **naming: Any) -> None:
        options = options or BridgeOptions()
        super().__init__(net, options, **naming)
        self.evaluations = options.evaluations
        self.stochastic = options.sigma > 0
        self.gate = options.gate
        self.guidance = Guidance.by_encoders(options.guided, options.guides) if options.guided else None

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        o = self.options
        clean = bridge_purify(
            self.net, images, evaluations=o.evaluations, sigma=o.sigma, checkpoint=o.checkpoint, generator=generator
        )
        return clean if o.strength == 1 else images + o.strength * (clean - images)
