"""Pairs that are used several times, with a stronger perturbation each time: "free" adversarial training.

The backward pass that computes the network's gradient also computes the image's, so the perturbation can ascend the
loss that the network descends at no further cost (Shafahi et al. 2019, arXiv 1904.12843). It starts where the bank's
attack ended, or at random, and every replay draws new noise: it becomes an attack on the expectation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from codefend.attacks.norms import uniform


class _Replay(NamedTuple):
    clean: Tensor
    attacked: Tensor  # a leaf, whose gradient the backward pass leaves
    radius: Tensor  # [B,1,1,1]


class Replays:
    """The current perturbations of the micro-batches that this process trains on, one for each slot of a step."""

    def __init__(self, *, max_eps: float, rel_step: float) -> None:
        """``max_eps``: largest l-inf radius, pixels; ``rel_step``: step in units of each image's radius."""
        self.max_eps, self.rel_step = max_eps, rel_step
        self._slots: dict[int, _Replay] = {}

    def begin(self, slot: int, clean: Tensor, attacked: Tensor | None, *, untouched: int, generator: Generator) -> None:
        """Start with new pairs ``[B, 3, H, W]``; without ``attacked`` ones at random points of random balls.

        The first ``untouched`` stay clean. A bank's pair keeps its own radius, but ascends within ``max_eps`` only.
        """
        if attacked is None:
            draw = torch.rand(len(clean), 1, 1, 1, generator=generator).to(clean)
            radius = 1 / 255 + draw * (self.max_eps - 1 / 255)
            attacked = (clean + radius * (2 * uniform(clean, generator) - 1)).clamp(0, 1)
        else:
            radius = (attacked - clean).abs().amax((1, 2, 3), keepdim=True)
        attacked = torch.cat([clean[:untouched], attacked[untouched:]])
        radius = radius.clamp_max(self.max_eps)
        radius[:untouched] = 0
        self._slots[slot] = _Replay(clean, attacked.detach().requires_grad_(True), radius)

    def attacked(self, slot: int) -> Tensor:
        """The adversarial images, one sign step up the loss since the last backward pass, inside each image's ball."""
        clean, attacked, radius = self._slots[slot]
        if attacked.grad is not None:
            low, high = (clean - radius).clamp_min(0), (clean + radius).clamp_max(1)
            moved = attacked.detach() + self.rel_step * radius * attacked.grad.sign()
            attacked = torch.minimum(torch.maximum(moved, low), high).requires_grad_(True)
            self._slots[slot] = _Replay(clean, attacked, radius)
        return attacked
