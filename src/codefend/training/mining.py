"""The attack inside a training loop: few sign steps, no bookkeeping.

An attack that is judged keeps the best images seen, and pays an extra evaluation for each look. In a loop of two or
three steps that is a third of the cost, and a failed attack would hand back the clean image.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from codefend.attacks.norms import uniform
from codefend.types import Objective


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
