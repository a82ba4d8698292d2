"""What every attack shares: a counted, averaged look at the objective, the best images seen, and hooks that watch.

An attack carries two optional hooks, both settable after construction:
``on_step(step, losses[B])`` hears the objective at every iterate, ``on_gradient(step, norms[B], nonfinite[B])`` hears
the l2 norm of the gradient and how many of its entries were not finite. ``Trace`` is both, ready made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from codefend.attacks.norms import choose, length
from codefend.types import Budget, CodefendError, Objective

OnStep = Callable[[int, Tensor], None]
OnGradient = Callable[[int, Tensor, Tensor], None]


class Watched(Protocol):
    """An attack whose steps can be listened to."""

    on_step: OnStep | None
    on_gradient: OnGradient | None


@dataclass
class Trace:
    """Loss curves and gradient health of one attack call, on the CPU: ``trace.attach(attack)``, attack, read."""

    losses: list[Tensor] = field(default_factory=list)  # per step [B]
    gradient_norms: list[Tensor] = field(default_factory=list)  # per gradient step [B], l2
    nonfinite: list[Tensor] = field(default_factory=list)  # per gradient step [B], entries replaced by zero

    def attach(self, attack: object) -> bool:
        """Listen to ``attack``; False when it has no hooks to offer."""
        if not (hasattr(attack, "on_step") and hasattr(attack, "on_gradient")):
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


def score(attack: Watched, objective: Objective, images: Tensor, eot: int, step: int | None = None) -> Tensor:
    """The objective with no gradient, mean of ``eot`` evaluations, ``[B]``; ``on_step`` hears it given a ``step``."""
    with torch.no_grad():
        losses = torch.stack([_per_example(objective(images), images) for _ in range(max(eot, 1))]).mean(0)
    if attack.on_step is not None and step is not None:
        attack.on_step(step, losses)
    return losses


def gradient(
    attack: Watched, objective: Objective, images: Tensor, eot: int, step: int | None = None
) -> tuple[Tensor, Tensor]:
    """Losses ``[B]`` and gradients, both means of ``eot`` samples taken one after another (memory of one sample).

    Entries that are not finite count as zero and are reported to ``on_gradient``. Raises CodefendError when the objective
    does not depend differentiably on the images.
    """
    images = images.detach().requires_grad_(True)
    losses = torch.zeros(0)
    total = torch.zeros_like(images, requires_grad=False)
    bad = torch.zeros(len(images), dtype=torch.long, device=images.device)
    for sample in range(max(eot, 1)):
        with torch.enable_grad():
            value = _per_example(objective(images), images)
            grad = torch.autograd.grad(value.sum(), images, allow_unused=True)[0] if value.requires_grad else None
        if grad is None:
            raise CodefendError(
                "this objective has no gradient in the images: use a score attack (square, rgf, spsa), "
                "or wrap the purifier in StraightThrough"
            )
        losses = value.detach() if sample == 0 else losses + value.detach()
        finite = torch.isfinite(grad)
        bad += (~finite).flatten(1).sum(1)
        total += torch.where(finite, grad, torch.zeros_like(grad))
    losses, total = losses / max(eot, 1), total / max(eot, 1)
    if step is not None:
        if attack.on_step is not None:
            attack.on_step(step, losses)
        if attack.on_gradient is not None:
            attack.on_gradient(step, length(total, "l2"), bad)
    return losses, total


def _per_example(losses: Tensor, images: Tensor) -> Tensor:
    if losses.shape != (len(images),):
        # A reduced loss would broadcast silently and tie the examples of a batch together.
        raise ValueError(f"an objective must return one number per image: [{len(images)}], not {list(losses.shape)}")
    return losses


class Adam:
    """Adam's direction (Kingma & Ba 2015, Algorithm 1), entry by entry, so that its state is per example.

    ``torch.optim.Adam`` does the same after seconds of imports.
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.betas, self.steps = betas, 0
        self.mean = self.square = torch.zeros(())

    def __call__(self, grad: Tensor) -> Tensor:
        """The next direction of ascent, about 1 per entry: bias-corrected mean over root mean square."""
        first, second = self.betas
        self.steps += 1
        self.mean = first * self.mean.to(grad) + (1 - first) * grad
        self.square = second * self.square.to(grad) + (1 - second) * grad.square()
        mean, square = self.mean / (1 - first**self.steps), self.square / (1 - second**self.steps)
        return mean / (square.sqrt() + 1e-12)


class Best:
    """The lowest objective seen so far for each example, and the images that reached it. nan never wins."""

    def __init__(self, images: Tensor, losses: Tensor) -> None:
        self.images = images.detach().clone()
        self.losses = torch.where(losses.isnan(), torch.full_like(losses, torch.inf), losses)

    def update(self, images: Tensor, losses: Tensor) -> Tensor:
        """Keep what improved; returns which examples did, ``[B]`` bool."""
        better = losses < self.losses  # False for nan
        self.images = choose(better, images.detach(), self.images)
        self.losses = torch.where(better, losses, self.losses)
        return better

    def settle(self, attack: Watched, objective: Objective, last: Tensor, budget: Budget) -> Tensor:
        """The images to return.

        The minimum of many noisy means flatters its winner, so with ``budget.eot > 1`` the winner meets the last
        iterate again on fresh samples, and the lower of the two fresh means is returned.
        """
        if budget.eot > 1:
            best = score(attack, objective, self.images, budget.eot)
            final = score(attack, objective, last, budget.eot)
            self.images = choose(final < best, last, self.images)
        return self.images
