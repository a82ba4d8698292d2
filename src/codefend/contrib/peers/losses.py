"""What the peers train and how they walk, re-implemented from their papers on our network. Pure and differentiable.

As in `diffusion`, everything lives in VE coordinates on [0, 1] pixels and the network predicts the clean image, here
``D``; a velocity or a noise prediction is a linear function of it, so each paper's loss is a squared error of D with
the weight that its own target implies. None of the peers had a bound on the residual.

Sources: HGD (Liao et al. 2018, arXiv 1712.02976), FlowPure (Collaert et al. 2025, arXiv 2505.13280), ADBM (Li et al.
2025, arXiv 2408.00315), CoDefend (Zhu et al. 2025, arXiv 2510.11096; we know no public code or tables of it, so what is
here is our reconstruction, "CoDefend-R").
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Generator, Tensor

from codefend.purifiers.diffusion import SHIFT_DATA, Denoiser, evaluate, noise_like, per_image, vp_sigma

SMALLEST = 1e-3  # of s and of noise levels in training: below it float32 rounding decides the target


def _wide(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)  # [B] against [B,3,H,W]


def _squared(images: Tensor, references: Tensor) -> Tensor:
    return (images - references).square().flatten(1).mean(1)


# --- HGD -------------------------------------------------------------------------------------------------------------


def feature_distance(features: Tensor, right: Tensor) -> Tensor:
    """HGD's feature-guided loss (FGD): L1 between a network's features of the denoised and of the clean image, ``[B]``.

    Both ``[B, T, D]``; relative to the mean magnitude of the clean ones, so that several encoders weigh alike.
    """
    return (features - right).abs().flatten(1).mean(1) / right.abs().flatten(1).mean(1)


# --- FlowPure --------------------------------------------------------------------------------------------------------


def sample_flow_times(count: int, *, generator: Generator | None = None) -> Tensor:
    """Shares ``s`` of the way left to go, ``[count]``, uniform; FlowPure's own t is 1 - s."""
    return torch.rand(count, generator=generator).clamp_min(SMALLEST)


def flow_loss(net: Denoiser, clean: Tensor, attacked: Tensor, s: Tensor) -> Tensor:
    """Conditional flow matching from attacked to clean, sigma = 0 (FlowPure-PGD), ``[B]``.

    x_t = t x_c + (1 - t) x_a has the velocity u = x_c - x_a. The network's is v = (D - x) / s, so that
    ||v - u||^2 = ||D - x_c||^2 / s^2; in units of a typical perturbation, which leaves the optimum where it is.
    """
    x = clean + _wide(s) * (attacked - clean)
    return _squared(net(x, s, torch.zeros_like(s)), clean) / (s * SHIFT_DATA) ** 2


def gauss_flow_loss(
    net: Denoiser, clean: Tensor, s: Tensor, *, noise: float = 0.3, generator: Generator | None = None
) -> Tensor:
    """The same from noise to clean, x_a := x_c + ``noise`` n (FlowPure-Gauss: no attack is seen in training), ``[B]``.

    The point at s is x_c with noise s * noise, so the network is asked as the unconditional prior is.
    """
    sigma = s * noise
    x = clean + _wide(sigma) * noise_like(clean, generator)
    return _squared(net(x, torch.zeros_like(s), sigma), clean) / sigma**2


def flow_purify(
    net: Denoiser,
    images: Tensor,
    *,
    steps: int = 9,  # the paper's grid of 10 points
    start: float = 1.0,
    noise: float = 0.0,  # the noise at s = 1 that the flow was trained from; 0 for one trained from attacks
    checkpoint: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Euler integration of the flow from s = ``start`` to 0 , one evaluation a step.

    An Euler step of v = (D - x) / s is x <- D + (s'/s)(x - D). With ``noise`` the image first gets the noise of
    ``start``: the paper's white-box variants are start = 1/2 and 1/3 of a noise of 0.3.
    """
    x = images + start * noise * noise_like(images, generator) if noise > 0 else images
    for now, then in pairwise(torch.linspace(start, 0, steps + 1, dtype=torch.float64).tolist()):
        share, level = (0.0, now * noise) if noise > 0 else (now, 0.0)
        x0 = evaluate(net, x, per_image(share, x), per_image(level, x), checkpoint=checkpoint)
        x = x0 + then / now * (x - x0)
    return x


# --- ADBM, and CoDefend-R after it -----------------------------------------------------------------------------------


def sample_bridge_levels(
    count: int, *, times: tuple[float, float] = (0.1, 0.2), generator: Generator | None = None
) -> tuple[Tensor, float]:
    """Noise levels ``[count]`` and that of the bridge's far end: T ~ U(*times) once a batch, t ~ U(0, T) per image.

    VP times, as `diffusion.vp_sigma` reads them.
    """
    low, high = times
    end = low + (high - low) * torch.rand((), generator=generator)
    inside = vp_sigma(end * torch.rand(count, generator=generator)).clamp_min(SMALLEST)
    return inside, float(vp_sigma(end))


def adbm_state(clean: Tensor, attacked: Tensor, sigma: Tensor, end: float, noise: Tensor) -> Tensor:
    """A point of ADBM's bridge, ``[B,3,H,W]``: x_c + (sigma/end)^2 (x_a - x_c) + sigma n.

    The paper's VP form on [-1, 1], x_t = sqrt(a_t) x_c + sqrt(1 - a_t) n + e a_T (1 - a_t) / ((1 - a_T) sqrt(a_t)),
    divided by sqrt(a_t) and mapped to [0, 1]: sigma^2 = (1 - a_t) / (4 a_t). At sigma = ``end`` it is the attacked
    image with the noise that a purifier adds; towards 0 the perturbation fades faster than the noise.
    """
    return clean + _wide((sigma / end) ** 2) * (attacked - clean) + _wide(sigma) * noise


def adbm_predict(net: Denoiser, clean: Tensor, attacked: Tensor, sigma: Tensor, end: float, noise: Tensor) -> Tensor:
    """D at a point of the bridge; the network knows the noise level alone, as the paper's knows the time alone."""
    return net(adbm_state(clean, attacked, sigma, end, noise), torch.zeros_like(sigma), sigma)


def adbm_loss(predicted: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
    """ADBM's loss, ``[B]``: the network's noise (x - D) / sigma against (x - x_c) / sigma.

    In the paper's terms the target is n + e sqrt(1 / a_t - 1) a_T / (1 - a_T). The squared error of the two is
    ||D - x_c||^2 / sigma^2; the factor 4 of [-1, 1] cancels.
    """
    return _squared(predicted, clean) / sigma**2
