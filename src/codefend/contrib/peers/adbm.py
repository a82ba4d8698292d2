"""ADBM (Li et al. 2025, arXiv 2408.00315): a bridge at large noise, with attacks in the training loop.

At test time it adds noise and denoises by DDIM: `DiffPure` with eta 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from codefend.attacks.norms import spread
from codefend.contrib.peers.base import SMALLEST, PeerConfig, PeerLoss, load_pocket, mean_square
from codefend.core.seeds import noise_like
from codefend.purifiers.base import clip
from codefend.purifiers.diffpure import vp_sigma
from codefend.purifiers.nets import Denoiser, PurifierNet
from codefend.training.fit import Losses
from codefend.training.frozen import word_objective
from codefend.training.mining import held, sign_steps
from codefend.victims.pocket import Pocket


@dataclass(frozen=True)
class AdbmConfig(PeerConfig):
    """The settings that determine the weights."""

    method: ClassVar[str] = "adbm"

    victim: str = "pocket"  # whose words are attacked
    eps: float = 8 / 255
    mining_steps: int = 3  # each as long as eps
    times: tuple[float, float] = (0.1, 0.2)  # range of the VP time of the bridge's far end

    def load_loss(self) -> PeerLoss:
        return adbm_training_loss(self, load_pocket(self.victim, self.method))


def adbm_training_loss(config: AdbmConfig, pocket: Pocket) -> PeerLoss:
    """ADBM's loss on attacks through the current network."""

    def loss(net: PurifierNet, clean: Tensor, attacked: Tensor, number: int, generator: Generator) -> Losses:
        sigma, end = sample_bridge_levels(len(clean), times=config.times, generator=generator)
        sigma, noise = sigma.to(clean), noise_like(clean, generator)
        objective = word_objective(pocket, clean)
        with held(net):
            attacked = sign_steps(
                # As in the paper, time and noise stay fixed over the steps.
                lambda images: objective(clip(adbm_predict(net, clean, images, sigma, end, noise))),
                clean,
                eps=config.eps,
                steps=config.mining_steps,
                rel_step=1.0,
                generator=generator,
            )
        prediction = adbm_predict(net, clean, attacked, sigma, end, noise)
        return {"bridge": adbm_loss(prediction, clean, sigma).mean()}

    return loss


def sample_bridge_levels(
    count: int, *, times: tuple[float, float] = (0.1, 0.2), generator: Generator | None = None
) -> tuple[Tensor, float]:
    """Noise levels ``[count]`` and that of the bridge's far end: T ~ U(*times) once a batch, t ~ U(0, T) per image.

    VP times, as `diffpure.vp_sigma` reads them.
    """
    low, high = times
    end = low + (high - low) * torch.rand((), generator=generator)
    inside = vp_sigma(end * torch.rand(count, generator=generator)).clamp_min(SMALLEST)
    return inside, float(vp_sigma(end))


def adbm_state(clean: Tensor, attacked: Tensor, sigma: Tensor, end: float, noise: Tensor) -> Tensor:
    """A point of ADBM's bridge, ``[B,3,H,W]``: x_c + (sigma/end)^2 (x_a - x_c) + sigma n.

    The paper's VP form on [-1, 1], x_t = sqrt(a_t) x_c + sqrt(1 - a_t) n + e a_T (1 - a_t) / ((1 - a_T) sqrt(a_t)),
    divided by sqrt(a_t) and mapped to [0, 1]: sigma^2 = (1 - a_t) / (4 a_t). At sigma = ``end`` it is the adversarial
    image with the noise that a purifier adds; towards 0 the perturbation fades faster than the noise.
    """
    return clean + spread((sigma / end) ** 2, clean) * (attacked - clean) + spread(sigma, clean) * noise


def adbm_predict(net: Denoiser, clean: Tensor, attacked: Tensor, sigma: Tensor, end: float, noise: Tensor) -> Tensor:
    """D at a point of the bridge; the network knows the noise level alone, as the paper's knows the time alone."""
    return net(adbm_state(clean, attacked, sigma, end, noise), torch.zeros_like(sigma), sigma)


def adbm_loss(prediction: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
    """ADBM's loss, ``[B]``: the network's noise (x - D) / sigma against (x - x_c) / sigma.

    In the paper's terms the target is n + e sqrt(1 / a_t - 1) a_T / (1 - a_T). The squared error of the two is
    ||D - x_c||^2 / sigma^2; the factor 4 of [-1, 1] cancels.
    """
    return mean_square(prediction, clean) / sigma**2
