"""The attack inside a training loop: few sign steps, no bookkeeping.

An evaluated attack returns the best iterate, which takes one more evaluation a step. With two or three steps that is a
third of the cost, and a failed attack would return the clean image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Generator, Tensor, nn

from codefend.attacks.norms import uniform
from codefend.attacks.pgd import PGD
from codefend.core.seeds import noise_like
from codefend.purifiers.base import clip
from codefend.purifiers.nets import PurifierNet
from codefend.types import Budget, Objective


def sign_steps(
    objective: Objective,
    clean: Tensor,
    *,
    eps: float | Tensor,  # pixels in [0, 1], one number or [B]
    steps: int,
    rel_step: float,  # step length in units of eps
    generator: Generator | None = None,
) -> Tensor:
    """The last iterate of PGD (Madry et al. 2018) from a random point of the l-inf ball, ``[B,3,H,W]``, detached.

    One step of 1.25 eps is fast adversarial training (Wong et al. 2020, arXiv 2001.03994).
    """
    radius = torch.as_tensor(eps, dtype=clean.dtype, device=clean.device).view(-1, 1, 1, 1)
    low, high = (clean - radius).clamp_min(0), (clean + radius).clamp_max(1)
    images = (clean + radius * (2 * uniform(clean, generator) - 1)).clamp(0, 1)
    for _ in range(steps):
        images = images.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(objective(images).sum(), images)
        images = torch.minimum(torch.maximum(images - rel_step * radius * grad.sign(), low), high)
    return images.detach()


def mine(
    net: PurifierNet,
    objective: Objective,
    clean: Tensor,
    *,
    eps: float | np.ndarray | Tensor,  # pixels in [0, 1]; one number, or [B] for lean mining
    sigma: float | Tensor,  # pixels in [0, 1], one number or [B]
    steps: int,
    lean: bool,
    generator: Generator,
) -> Tensor:
    """Attack ``objective`` of purified images through one evaluation of ``net``, ``[B,3,H,W]``, detached.

    Gradients are exact and the noise is drawn anew in each step (ADBM, arXiv 2408.00315, fixes it). ``lean``:
    `sign_steps` instead of PGD.
    """
    ones = clean.new_ones(len(clean))
    levels = ones * sigma
    noise_free = not bool(levels.any())

    def purified(images: Tensor) -> Tensor:
        noisy = images if noise_free else images + levels.view(-1, 1, 1, 1) * noise_like(images, generator)
        return objective(clip(net(noisy, ones, levels)))  # clipping is straight-through, as in an evaluation

    with held(net):
        if lean:
            rel_step = 1.25 if steps == 1 else 1.5 / steps
            radii = torch.as_tensor(eps).to(clean)
            mined = sign_steps(purified, clean, eps=radii, steps=steps, rel_step=rel_step, generator=generator)
        else:
            mined = PGD(rel_step=1.5)(purified, clean, Budget(eps=float(eps), steps=steps), generator=generator)
    return mined.detach()


@contextmanager
def held(net: nn.Module) -> Iterator[None]:
    """Inside, no parameter of ``net`` has a gradient: an attack needs one in the images alone."""
    net.requires_grad_(False)
    try:
        yield
    finally:
        net.requires_grad_(True)


def n_fgsm(
    net: PurifierNet,
    objective: Objective,
    clean: Tensor,
    *,
    eps: Tensor,  # [B], pixels in [0, 1]
    sigma: Tensor,  # [B]
    start: float,
    generator: Generator,
) -> Tensor:
    """One sign step of eps on ``objective`` of purified images, ``[B,3,H,W]``, detached; not projected to the ball.

    N-FGSM (de Jorge et al. 2022, arXiv 2202.01181): a uniform start of half-width ``start`` eps, and no projection,
    prevent catastrophic overfitting. The purifier's noise is drawn here; the training step draws its own.
    """
    radius = eps.view(-1, 1, 1, 1)
    images = (clean + start * radius * (2 * uniform(clean, generator) - 1)).requires_grad_(True)
    with held(net):
        noisy = images + sigma.view(-1, 1, 1, 1) * noise_like(images, generator)
        losses = objective(clip(net(noisy, torch.ones_like(sigma), sigma)))
        (grad,) = torch.autograd.grad(losses.sum(), images)
    return (images - radius * grad.sign()).clamp(0, 1).detach()
