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
    """Options saved with the weights replace these defaults."""

    evaluations: int = 1
    sigma: float = 0.0  # noise added before the first evaluation, pixels in [0, 1]
    checkpoint: bool = False
    strength: float = 1.0  # factor of the change; below 1 leaves more of the input, above 1 extrapolates
    gate: bool = False  # return images unchanged that the weights' detector finds clean
    guided: float = 0.0  # share of further movement away from the attacked image's features, 0.2 is tested (`Guidance`)
    guides: str = "lite0+lite2"  # the encoders of these features

    def __post_init__(self) -> None:
        if not 1 <= self.evaluations <= 4:
            raise CodefendError(f"bridge evaluations must be 1 to 4, got {self.evaluations}")
        if not 0 <= self.sigma <= 0.5:
            raise CodefendError(f"bridge sigma must be 0 to 0.5, got {self.sigma:g}")
        if not 0 < self.strength <= 1.5:
            raise CodefendError(f"bridge strength must be above 0, to 1.5, got {self.strength:g}")
        if not 0 <= self.guided <= 1:
            raise CodefendError(f"bridge guided must be 0 to 1, got {self.guided:g}")


class Bridge(NetPurifier):
    """One to four network evaluations along the bridge; deterministic unless ``sigma`` adds noise first."""

    name, kind = "bridge", "bridge"
    options_class = BridgeOptions
    after_network = ("gate", "guided", "guides")
    options: BridgeOptions

    def __init__(self, net: PurifierNet, options: BridgeOptions | None = None, **names: Any) -> None:
        super().__init__(net, options, **names)
        o = self.options
        self.evaluations, self.stochastic, self.gate = o.evaluations, o.sigma > 0, o.gate
        self.noise = o.sigma
        if o.guided or o.guides != BridgeOptions.guides:  # a wrong name fails also where nothing is guided
            guides = encoder_names(o.guides)
            self.guidance = Guidance.by_encoders(o.guided, guides) if o.guided else None

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        o = self.options
        clean = bridge_purify(
            self.net,
            images,
            evaluations=o.evaluations,
            sigma=o.sigma,
            noisy=not self.noise,
            checkpoint=o.checkpoint,
            generator=generator,
        )
        return clean if o.strength == 1 else images + o.strength * (clean - images)
