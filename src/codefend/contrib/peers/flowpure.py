"""FlowPure (Collaert et al. 2025, arXiv 2505.13280): a flow from adversarial or noisy images to clean ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from codefend.attacks.norms import spread
from codefend.contrib.peers.base import SMALLEST, PairsPeerConfig, PeerConfig, PeerLoss, mean_square
from codefend.core.seeds import noise_like
from codefend.purifiers.base import NetPurifier
from codefend.purifiers.nets import SHIFT_DATA, Denoiser, PurifierNet, evaluate, per_image
from codefend.training.fit import Losses
from codefend.types import CodefendError

# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowPureConfig(PairsPeerConfig):
    """FlowPure-PGD: everything that decides the weights."""

    method: ClassVar[str] = "flowpure"

    clean: float = 0.1

    def load_loss(self) -> PeerLoss:
        def loss(net: PurifierNet, clean: Tensor, attacked: Tensor, number: int, generator: Generator) -> Losses:
            s = sample_flow_times(len(clean), generator=generator).to(clean)
            return {"flow": flow_loss(net, clean, attacked, s).mean()}

        return loss


@dataclass(frozen=True)
class FlowPureGaussConfig(PeerConfig):
    """FlowPure-Gauss, which is trained without attacks: everything that decides the weights."""

    method: ClassVar[str] = "flowpure-gauss"

    noise: float = 0.3  # at the flow's far end, pixels in [0, 1]

    def load_loss(self) -> PeerLoss:
        def loss(net: PurifierNet, clean: Tensor, attacked: Tensor, number: int, generator: Generator) -> Losses:
            s = sample_flow_times(len(clean), generator=generator).to(clean)
            return {"flow": gauss_flow_loss(net, clean, s, noise=self.noise, generator=generator).mean()}

        return loss

    def purifier_options(self) -> dict[str, float]:
        return {"noise": self.noise}


def sample_flow_times(count: int, *, generator: Generator | None = None) -> Tensor:
    """Remaining shares ``s`` of the path, ``[count]``, uniform; FlowPure's own t is 1 - s."""
    return torch.rand(count, generator=generator).clamp_min(SMALLEST)


def flow_loss(net: Denoiser, clean: Tensor, attacked: Tensor, s: Tensor) -> Tensor:
    """Conditional flow matching from adversarial to clean images, sigma = 0 (FlowPure-PGD), ``[B]``.

    x_t = t x_c + (1 - t) x_a has the velocity u = x_c - x_a. The network's is v = (D - x) / s, so that
    ||v - u||^2 = ||D - x_c||^2 / s^2; in units of a typical perturbation, which does not move the optimum.
    """
    x = clean + spread(s, clean) * (attacked - clean)
    return mean_square(net(x, s, torch.zeros_like(s)), clean) / (s * SHIFT_DATA) ** 2


def gauss_flow_loss(
    net: Denoiser, clean: Tensor, s: Tensor, *, noise: float = 0.3, generator: Generator | None = None
) -> Tensor:
    """Conditional flow matching from noise to clean images, x_a := x_c + ``noise`` n (FlowPure-Gauss), ``[B]``.

    The point at s is x_c with noise s * noise, so the network has the inputs of the unconditional prior.
    """
    sigma = s * noise
    x = clean + spread(sigma, clean) * noise_like(clean, generator)
    return mean_square(net(x, torch.zeros_like(s), sigma), clean) / sigma**2


# --- purification ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowOptions:
    """``noise``: that the flow was trained from, 0 for the PGD form; ``start``: share of the path to integrate."""

    steps: int = 9  # the paper's grid of 10 points
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
    """Euler steps along a learned flow; noise only in the Gaussian form."""

    name, kind = "flowpure", "flowpure"
    options_class, evaluations_option = FlowOptions, "steps"
    options: FlowOptions

    def __init__(self, net: PurifierNet, options: FlowOptions | None = None, **names: Any) -> None:
        super().__init__(net, options, **names)
        self.evaluations, self.stochastic = self.options.steps, self.options.noise > 0
        self.noise = self.options.start * self.options.noise

    def denoise(self, images: Tensor, generator: Generator | None) -> Tensor:
        """Euler integration of the flow from s = ``start`` to 0, one evaluation a step.

        An Euler step of v = (D - x) / s is x <- D + (s'/s)(x - D). With ``noise`` the image first gets the noise of
        ``start``: the paper's white-box variants are start = 1/2 and 1/3 of a noise of 0.3.
        """
        o = self.options
        x = images + self.noise * noise_like(images, generator) if self.noise else images
        for now, then in pairwise(torch.linspace(o.start, 0, o.steps + 1, dtype=torch.float64).tolist()):
            share, level = (0.0, now * o.noise) if o.noise > 0 else (now, 0.0)
            x0 = evaluate(self.net, x, per_image(share, x), per_image(level, x), checkpoint=o.checkpoint)
            x = x0 + then / now * (x - x0)
        return x
