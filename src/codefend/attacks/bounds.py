"""Attacks with their own bound (a patch, a flow, a colour distance) next to those inside ``Budget``'s ball.

`quantize_attacked` and `excess` treat both alike, so that the evaluation needs no special cases.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from codefend.attacks.norms import distance, quantize_in_budget
from codefend.core.images import quantize8
from codefend.types import Budget


@runtime_checkable
class OwnBound(Protocol):
    """An attack that ignores ``Budget.norm`` and ``Budget.eps``."""

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """How far each image exceeds the attack's own bound, ``[B]``: 0 inside it, with a tolerance for 8 bits."""
        ...


def quantize_attacked(attack: object, images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """Attacked images as 8-bit uploads: inside the ball, unless the attack has its own bound."""
    if isinstance(attack, OwnBound):
        return quantize8(images)
    return quantize_in_budget(images, clean, budget)


def excess(attack: object, images: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """How far each image is outside the pixel box or the attack's bound, ``[B]``; inf where it is not finite."""
    flat = images.flatten(1)
    box = torch.maximum(-flat.amin(1), flat.amax(1) - 1)
    if isinstance(attack, OwnBound):
        over = attack.outside(images, clean)
    else:
        over = distance(images, clean, budget.norm) - budget.eps
    worst = torch.maximum(box, over).clamp_min(0)
    return torch.where(flat.isfinite().all(1), worst, torch.full_like(worst, torch.inf))
