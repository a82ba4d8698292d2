"""A record of one attack call: loss curve and gradient statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from codefend.attacks.base import AttackBase


@dataclass
class Trace:
    """Loss curves and gradient statistics of one attack call, on the CPU. Call ``trace.attach(attack)`` first."""

    losses: list[Tensor] = field(default_factory=list)  # per step [B]
    gradient_norms: list[Tensor] = field(default_factory=list)  # per gradient step [B], l2
    nonfinite: list[Tensor] = field(default_factory=list)  # per gradient step [B], entries replaced by zero

    def attach(self, attack: object) -> bool:
        """Record ``attack``; False when it has no hooks (`base.AttackBase`)."""
        if not isinstance(attack, AttackBase):
            return False
        attack.on_step, attack.on_gradient = self.step, self.gradient
        return True

    def step(self, step: int, losses: Tensor) -> None:
        self.losses.append(losses.detach().cpu())

    def gradient(self, step: int, norms: Tensor, nonfinite: Tensor) -> None:
        self.gradient_norms.append(norms.detach().cpu())
        self.nonfinite.append(nonfinite.detach().cpu())

    def zero_gradients(self) -> Tensor:
        """Share of gradient steps with an exactly zero gradient, ``[B]``; nan when there were none."""
        if not self.gradient_norms:
            return torch.tensor(float("nan"))
        return (torch.stack(self.gradient_norms) == 0).float().mean(0)
