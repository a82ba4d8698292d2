"""Diffusion and bridges in pixel coordinates: schedules, preconditioning, losses, samplers. Pure and differentiable.

Everything lives in variance-exploding (VE) coordinates on [0, 1] pixels: a noisy image is ``x + sigma * n`` with
``n ~ N(0, I)``. The variance-preserving (VP) process of the papers runs on [-1, 1] and shrinks the image; dividing by
its scale gives the VE form, and halving goes from [-1, 1] to [0, 1] (``vp_sigma``).

Sources: Song et al. 2021 (score SDE, arXiv 2011.13456), Karras et al. 2022 (EDM, arXiv 2206.00364), Nie et al. 2022
(DiffPure, arXiv 2205.07460), Song et al. 2021 (DDIM, arXiv 2010.02502), Li et al. 2025 (ADBM, arXiv 2408.00315).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint as recompute

# (noisy images [B,3,H,W], s [B], sigma [B]) -> prediction of the clean images. `nets.PurifierNet` is one.
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]

BETA_MIN, BETA_MAX = 0.1, 20.0  # VP SDE, score SDE eq. 32 and appendix C
SIGMA_DATA = 0.25  # standard deviation of clean pixels in [0, 1]; EDM's 0.5 on [-1, 1]
SHIFT_DATA = 8 / 255  # root mean square of an adversarial perturbation, pixels


def per_image(value: Tensor | float, images: Tensor) -> Tensor:
    """``value`` as a ``[B]`` tensor on the images' device and dtype."""
    return torch.as_tensor(value, dtype=images.dtype, device=images.device).expand(images.shape[0])


def _wide(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)  # [B] against [B,3,H,W]


def noise_like(images: Tensor, generator: Generator | None = None) -> Tensor:
    """Standard normal noise of the images' shape, dtype and device, drawn from ``generator``.

    Drawn on the generator's own device, so that one CPU seed gives the same noise on every device.
    """
    source = images.device if generator is None else generator.device
    noise = torch.randn(images.shape, generator=generator, device=source, dtype=images.dtype)
    return noise.to(images.device)


# --- Schedules ---------------------------------------------------------------------------------------------------


def vp_log_mean(t: Tensor) -> Tensor:
    """Log of the VP process' mean coefficient at time ``t`` in [0, 1]; alpha_bar = exp(2 * it) (score SDE, eq. 33)."""
    return -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN


def vp_sigma(t: Tensor) -> Tensor:
    """Noise level of VP time ``t`` in [0, 1] pixels: sqrt((1 - alpha_bar) / alpha_bar) / 2."""
    return 0.5 * torch.expm1(-2 * vp_log_mean(t)).sqrt()


class Scales(NamedTuple):
    """Coefficients, ``[B]`` each, of D(x) = c_skip x + c_out F(c_in x; c_noise), F the raw network (EDM, eq. 7)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(
    s: Tensor, sigma: Tensor, *, sigma_data: float = SIGMA_DATA, shift_data: float = SHIFT_DATA
) -> Scales:
    """EDM preconditioning (Karras et al. 2022, Table 1) of an input with a shift as well as noise. All ``[B]``.

    The input is x = x_c + s d + sigma n, with d the adversarial perturbation (RMS ``shift_data``) and n the noise.
    c_skip is EDM's Wiener gain for the noise alone. The rest follows from EDM's two conditions, unit variance of the
    network's input and of its target:

        c_skip    = sigma_data^2 / (sigma_data^2 + sigma^2)
        c_in^-2   = sigma_data^2 + sigma^2 + (s shift_data)^2
        c_out^2   = sigma^2 c_skip + (c_skip s shift_data)^2
        c_noise   = ln(sigma^2 + (s shift_data)^2) / 8

    At s = 0 it is EDM's. At sigma = 0 c_skip is 1, so that a zero network is the identity. c_noise is EDM's ln(.)/4 of
    the total corruption: a prior given a shift first removes as much noise as the shift is large.
    """
    noise2, data2, shift2 = sigma**2, sigma_data**2, (s * shift_data) ** 2
    c_skip = data2 / (noise2 + data2)
    # The epsilons keep gradients and the logarithm finite at s = sigma = 0.
    c_out = (noise2 * c_skip + c_skip**2 * shift2 + 1e-12).sqrt()
    c_in = (data2 + noise2 + shift2).rsqrt()
    return Scales(c_skip, c_out, c_in, (noise2 + shift2 + 1e-8).log() / 8)


# --- The unconditional prior -------------------------------------------------------------------------------------


def sample_sigmas(
    count: int,
    *,
    log_mean: float = -2.4,
    log_std: float = 1.0,
    low: float = 2e-3,  # pixels in [0, 1]
    high: float = 0.65,  # VP time 0.31: above every t that purification uses
    generator: Generator | None = None,
) -> Tensor:
    """Log-normal training noise levels ``[count]`` (EDM, Table 1: P_mean, P_std), shifted to VP times up to 0.3."""
    return (torch.randn(count, generator=generator) * log_std + log_mean).exp().clamp(low, high)


def prior_loss(net: Denoiser, clean: Tensor, sigma: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Denoising loss of the unconditional prior, ``[B]``: lambda(sigma) ||D(x + sigma n; sigma) - x||^2 (EDM, eq. 2).

    lambda = 1 / c_out^2 weights the raw network's squared error equally at every level (EDM, eq. 8).
    """
    noisy = clean + _wide(sigma) * noise_like(clean, generator)
    s = torch.zeros_like(sigma)
    error = (net(noisy, s, sigma) - clean).square().flatten(1).mean(1)
    return error / preconditioning(s, sigma).c_out ** 2


def denoise_from(
    net: Denoiser,
    noisy: Tensor,
    levels: Tensor,
    *,
    eta: float = 1.0,  # 1 ancestral (DDPM), 0 deterministic (DDIM)
    checkpoint: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Run the reverse process from ``noisy`` (noise ``levels[0]``) down to ``levels[-1] = 0``; one evaluation per step.

    A step to level u < v keeps the posterior q(x_u | x_v, x_0), a Brownian bridge in VE coordinates:
    x <- x0 + (down/v)(x - x0) + up n, up = eta u sqrt(1 - u^2/v^2), down^2 = u^2 - up^2. eta = 1 is DDPM's ancestral
    sampler (the discretized reverse SDE of DiffPure), eta = 0 is DDIM (Song et al. 2021, eq. 16).
    ``checkpoint`` recomputes each evaluation in the backward pass: the memory of one step instead of all.
    """
    x = noisy
    s = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    for v, u in pairwise(levels.tolist()):
        x0 = evaluate(net, x, s, per_image(v, x), checkpoint=checkpoint)
        up = eta * u * math.sqrt(1 - (u / v) ** 2)
        x = x0 + math.sqrt(u * u - up * up) / v * (x - x0)
        if up > 0:
            x = x + up * noise_like(x, generator)
    return x


def diffpure_levels(t: float, steps: int) -> Tensor:
    """Noise levels from VP time ``t`` to 0 in ``steps`` equal steps of time, ``[steps + 1]`` (the paper: 1000 t)."""
    return vp_sigma(torch.linspace(t, 0.0, steps + 1, dtype=torch.float64))


def diffpure(
    net: Denoiser,
    images: Tensor,
    *,
    t: float = 0.15,  # VP time: DiffPure's ImageNet setting for 4/255
    steps: int = 150,
    eta: float = 1.0,
    noisy: bool = False,  # the images have the noise of time t already
    checkpoint: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Diffuse to time ``t``, then denoise with an unconditional prior (DiffPure, Nie et al. 2022, eq. 4 and 5)."""
    levels = diffpure_levels(t, steps)
    start = images if noisy else images + float(levels[0]) * noise_like(images, generator)
    return denoise_from(net, start, levels, eta=eta, checkpoint=checkpoint, generator=generator)


def evaluate(net: Denoiser, x: Tensor, s: Tensor, sigma: Tensor, *, checkpoint: bool = False) -> Tensor:
    """One network evaluation, with ``checkpoint`` recomputed in the backward pass. Networks here draw no noise."""
    if checkpoint and torch.is_grad_enabled():
        result: Tensor = recompute(net, x, s, sigma, use_reentrant=False, preserve_rng_state=False)
        return result
    return net(x, s, sigma)


# --- The bridge from adversarial to clean ------------------------------------------------------------------------


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
    return clean + _wide(s) * (attacked - clean) + _wide(level) * noise_like(clean, generator), level


def bridge_predict(
    net: Denoiser,
    clean: Tensor,
    attacked: Tensor,
    s: Tensor,
    sigma: Tensor | float = 0.0,
    *,
    gamma: float = 0.0,
    generator: Generator | None = None,
) -> Tensor:
    """The network's prediction of the clean image, ``[B,3,H,W]``, from a random point of the bridge."""
    x, level = bridge_state(clean, attacked, s, sigma, gamma=gamma, generator=generator)
    return net(x, s, level)


def charbonnier(images: Tensor, references: Tensor, *, eps: float = 1e-3) -> Tensor:
    """Smooth L1 distance per image, ``[B]``: mean of sqrt(d^2 + eps^2) - eps (Charbonnier et al. 1994)."""
    return ((images - references).square() + eps**2).sqrt().flatten(1).mean(1) - eps


def bridge_purify(
    net: Denoiser,
    images: Tensor,
    *,
    evaluations: int = 1,
    sigma: float = 0.0,  # noise added before the first evaluation, pixels in [0, 1]
    noisy: bool = False,  # the images have this noise already
    checkpoint: bool = False,
    generator: Generator | None = None,
) -> Tensor:
    """Purify ``[B,3,H,W]`` along the bridge, from s = 1 to 0 in halves:

        x  <- y + sigma n                        y: the attacked image, n ~ N(0, I)
        x0 <- D(x; s, s sigma)                   for s = 1, 1/2, 1/4, ...
        x  <- x0 + (s'/s) (x - x0)               s' = s / 2, and 0 in the last step

    One evaluation returns the network's prediction. Shift and noise shrink together along the line through x0: the
    noise level at s is s sigma, and a perfect network gives the same image for any number of evaluations.
    """
    x = images + sigma * noise_like(images, generator) if sigma > 0 and not noisy else images
    times = [0.5**k for k in range(evaluations)] + [0.0]
    for s, s_next in pairwise(times):
        x0 = evaluate(net, x, per_image(s, x), per_image(s * sigma, x), checkpoint=checkpoint)
        x = x0 + s_next / s * (x - x0)
    return x
