"""The project's own purifier: a supervised diffusion bridge from adversarial to clean images.

Its states and times in training are the functions at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Generator, Tensor

from codefend.core.seeds import noise_like
from codefend.purifiers.base import NetPurifier
from codefend.purifiers.guidance import Guidance, encoder_names
from codefend.purifiers.nets import PurifierNet, evaluate, per_image
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
        """As `NetPurifier`. Raises CodefendError for a gate without a detector."""
        super().__init__(net, options, **names)
        o = self.options
        self.evaluations, self.stochastic, self.gate = o.evaluations, o.sigma > 0, o.gate
        self.noise = o.sigma
        if o.gate and self.detector is None:
            raise CodefendError(
                f"{self.name} has no detection score to open its gate by: use the weights' own options, or calibrate "
                "them (`codefend calibrate`)"
            )
        if o.guided or o.guides != BridgeOptions.guides:  # a wrong name fails also where nothing is guided
            guides = encoder_names(o.guides)
            self.guidance = Guidance.by_encoders(o.guided, guides) if o.guided else None

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        """Purify ``[B,3,H,W]`` along the bridge, from s = 1 to 0 in halves:

            x  <- y + sigma n                        y: the attacked image, n ~ N(0, I)
            x0 <- D(x; s, s sigma)                   for s = 1, 1/2, 1/4, ...
            x  <- x0 + (s'/s) (x - x0)               s' = s / 2, and 0 in the last step

        One evaluation returns the network's prediction. Shift and noise shrink together along the line through x0: the
        noise level at s is s sigma, and a perfect network gives the same image for any number of evaluations.
        """
        o = self.options
        x = images + o.sigma * noise_like(images, generator) if self.noise else images
        times = [0.5**k for k in range(o.evaluations)] + [0.0]
        for s, s_next in pairwise(times):
            x0 = evaluate(self.net, x, per_image(s, x), per_image(s * o.sigma, x), checkpoint=o.checkpoint)
            x = x0 + s_next / s * (x - x0)
        return x if o.strength == 1 else images + o.strength * (x - images)

    def behind_noise(self) -> Bridge:
        """As `Purifier.behind_noise`, at a ``strength`` of 1: it scales the change of an image without noise."""
        rest = cast(Bridge, super().behind_noise())
        rest.options = replace(self.options, strength=1.0)
        return rest


def sample_bridge_times(count: int, *, at_one: float = 0.5, generator: Generator | None = None) -> Tensor:
    """Training times ``[count]``: s = 1 with probability ``at_one`` (one evaluation is the default), else U(0, 1)."""
    uniform, coin = torch.rand(2, count, generator=generator)
    return torch.where(coin < at_one, torch.ones(count), uniform)


def sample_bridge_sigmas(
    count: int, *, clean: float = 0.4, low: float = 0.0, high: float = 0.25, generator: Generator | None = None
) -> Tensor:
    """Noise added to attacked training images, ``[count]``: none with probability ``clean``, else U(low, high)."""
    uniform, coin = torch.rand(2, count, generator=generator)
    return torch.where(coin < clean, torch.zeros(count), low + uniform * (high - low))


def bridge_state(
    clean: Tensor,
    attacked: Tensor,
    s: Tensor,
    sigma: Tensor | float = 0.0,
    *,
    gamma: float = 0.0,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A point of the bridge and the noise level in it: ``[B,3,H,W]`` and ``[B]``.

    x_s = (1 - s) x_c + s y + gamma sqrt(s(1-s)) xi, y = x_a + sigma n. FlowPure is sigma = gamma = 0 (arXiv
    2505.13280), I2SB another gamma(s) (arXiv 2302.05872). At s = 0 it is x_c, at s = 1 it is y.
    """
    sigma = per_image(sigma, clean)
    level = (s**2 * sigma**2 + gamma**2 * s * (1 - s)).sqrt()  # n and xi are independent: one draw serves both
    noise = level.view(-1, 1, 1, 1) * noise_like(clean, generator)
    return clean + s.view(-1, 1, 1, 1) * (attacked - clean) + noise, level


def charbonnier(images: Tensor, references: Tensor, *, eps: float = 1e-3) -> Tensor:
    """Smooth L1 distance per image, ``[B]``: mean of sqrt(d^2 + eps^2) - eps (Charbonnier et al. 1994)."""
    return ((images - references).square() + eps**2).sqrt().flatten(1).mean(1) - eps
