"""Pairs that are trained on several times over, each time a harder one: "free" adversarial training.

The backward pass that gives the network's gradient gives the picture's as well, so the perturbation can climb the very
loss that the network descends at no further cost (Shafahi et al. 2019, arXiv 1904.12843). It starts where the bank's
attack ended, or at random, and each update draws new noise: over its replays it becomes an attack on the expectation.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from codefend.attacks.norms import uniform


class Replays:
    """The present perturbations of the micro-batches that this process trains on."""

    def __init__(self, *, max_eps: float, rel_step: float) -> None:
        """``max_eps``: l-inf radius at most, pixels; ``rel_step``: a climb in units of each picture's radius."""
        self.max_eps, self.rel_step = max_eps, rel_step
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # slot -> attacked pictures, radii [B,1,1,1]

    def begin(self, slot: int, clean: Tensor, attacked: Tensor, *, untouched: int, generator: Generator) -> None:
        """Hold new pairs ``[B, 3, H, W]``; where ``attacked`` is empty they start at random points of random balls.

        The first ``untouched`` stay clean. A bank's pair keeps its own radius, but climbs within ``max_eps`` only.
        """
        if attacked.numel():
            radius = (attacked - clean).abs().amax((1, 2, 3), keepdim=True)
        else:
            draw = torch.rand(len(clean), 1, 1, 1, generator=generator).to(clean)
            radius = 1 / 255 + draw * (self.max_eps - 1 / 255)
            attacked = (clean + radius * (2 * uniform(clean, generator) - 1)).clamp(0, 1)
        attacked = torch.cat([clean[:untouched], attacked[untouched:]])
        radius = radius.clamp_max(self.max_eps)
        radius[:untouched] = 0
        self._held[slot] = attacked, radius

    def pictures(self, slot: int) -> Tensor:
        """The attacked pictures as they are now, a leaf whose gradient `climb` wants."""
        return self._held[slot][0].detach().requires_grad_(True)

    def climb(self, slot: int, clean: Tensor, attacked: Tensor) -> None:
        """One sign step up the loss whose gradient ``attacked`` carries, kept in each picture's ball."""
        assert attacked.grad is not None
        radius = self._held[slot][1]
        low, high = (clean - radius).clamp_min(0), (clean + radius).clamp_max(1)
        moved = attacked.detach() + self.rel_step * radius * attacked.grad.sign()
        self._held[slot] = torch.minimum(torch.maximum(moved, low), high), radius
