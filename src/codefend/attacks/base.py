"""The base classes of attacks: hooks, averaged evaluations of the objective, and the best images and prompts so far.

An attack has two optional hooks, which can be set after construction:
``on_step(step, losses[B])`` receives the objective at every iterate, ``on_gradient(step, norms[B], nonfinite[B])`` the
l2 norm of the gradient and the number of its entries that were not finite. `Trace` records both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from codefend.attacks.norms import OwnBound, choose, length
from codefend.types import Budget, CodefendError, Objective

OnStep = Callable[[int, Tensor], None]
OnGradient = Callable[[int, Tensor, Tensor], None]
PromptObjective = Callable[[Sequence[str]], Objective]  # one prompt per image -> objective of the images


@dataclass(kw_only=True)
class AttackBase:
    """Hooks, evaluations of an objective that report to them, and the choice of the best images."""

    name: str = ""
    on_step: OnStep | None = None
    on_gradient: OnGradient | None = None

    def score(self, objective: Objective, images: Tensor, eot: int, step: int | None = None) -> Tensor:
        """The objective without a gradient, mean of ``eot`` evaluations, ``[B]``; reported if ``step`` is given."""
        with torch.no_grad():
            losses = torch.stack([_per_example(objective(images), images) for _ in range(max(eot, 1))]).mean(0)
        if self.on_step is not None and step is not None:
            self.on_step(step, losses)
        return losses

    def gradient(
        self, objective: Objective, images: Tensor, eot: int, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses ``[B]`` and gradients as `mean_gradient` gives them; reported if ``step`` is given."""
        losses, grad, nonfinite = mean_gradient(objective, images, eot)
        if step is not None:
            if self.on_step is not None:
                self.on_step(step, losses)
            if self.on_gradient is not None:
                self.on_gradient(step, length(grad, "l2"), nonfinite)
        return losses, grad

    def best_of(self, objective: Objective, images: Tensor, eot: int, step: int | None = None) -> BestImages:
        """A record that starts with ``images``."""
        return BestImages(images, self.score(objective, images, eot, step))

    def select(self, best: BestImages, objective: Objective, last: Tensor, budget: Budget) -> Tensor:
        """The images to return: the best, or ``last`` where it is better on fresh samples.

        The minimum of many noisy means is biased downwards. With ``budget.eot > 1`` the best images and the last
        iterate are therefore evaluated again on fresh samples, and the lower of the two fresh means wins.
        """
        if budget.eot > 1:
            fresh = self.score(objective, best.images, budget.eot)
            best.images = choose(self.score(objective, last, budget.eot) < fresh, last, best.images)
        return best.images


@dataclass(kw_only=True)
class ImageAttack(AttackBase, ABC):
    """An attack on the pixels; a subclass implements `perturb`.

    Returns the images with the lowest objective, inside the budget (or the attack's own bound, `norms.OwnBound`) and
    inside [0, 1]. With ``eps`` 0 the images are returned unchanged, unless the attack has its own bound.
    """

    def __call__(
        self, objective: Objective, images: Tensor, budget: Budget, *, generator: Generator | None = None
    ) -> Tensor:
        if budget.eps == 0 and not isinstance(self, OwnBound):
            return images
        return self.perturb(objective, images.detach(), budget, generator)

    @abstractmethod
    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        """The attack itself, on ``clean`` ``[B, 3, H, W]``, which is left unchanged."""


@dataclass(kw_only=True)
class TextAttack(AttackBase, ABC):
    """An attack on prompts, images or both; returns the pairs with the lowest objective, one per example.

    Its objective is a function of the prompts that gives an objective of the images, so that an attack on both can
    pass the objective of its current prompts to any image attack. ``budget.steps`` is the number of evaluations per
    example; norm and eps bound the change of the images.
    """

    @abstractmethod
    def __call__(
        self,
        objective: PromptObjective,
        images: Tensor,
        prompts: Sequence[str],
        budget: Budget,
        *,
        generator: Generator | None = None,
    ) -> tuple[Tensor, list[str]]: ...


def mean_gradient(objective: Objective, images: Tensor, eot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses ``[B]``, gradients, and the number of entries ``[B]`` that were not finite and count as zero.

    Losses and gradients are means of ``eot`` samples taken one after another (memory of one sample). Raises
    CodefendError when the objective is not differentiable in the images.
    """
    images, samples = images.detach().requires_grad_(True), max(eot, 1)
    losses = torch.zeros(0)
    total = torch.zeros_like(images, requires_grad=False)
    nonfinite = torch.zeros(len(images), dtype=torch.long, device=images.device)
    for sample in range(samples):
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
        nonfinite += (~finite).flatten(1).sum(1)
        total += torch.where(finite, grad, torch.zeros_like(grad))
    return losses / samples, total / samples, nonfinite


def _per_example(losses: Tensor, images: Tensor) -> Tensor:
    if losses.shape != (len(images),):
        # A reduced loss would broadcast silently and tie the examples of a batch together.
        raise ValueError(f"an objective must return one number per image: [{len(images)}], not {list(losses.shape)}")
    return losses


class BestImages:
    """For each example the lowest objective so far and the image that reached it. nan never wins."""

    def __init__(self, images: Tensor, losses: Tensor) -> None:
        self.images = images.detach().clone()
        self.losses = nan_to_inf(losses)

    def update(self, images: Tensor, losses: Tensor) -> Tensor:
        """Replace the examples that improved; returns the mask of these, ``[B]`` bool."""
        better = losses < self.losses  # False for nan
        self.images = choose(better, images.detach(), self.images)
        self.losses = torch.where(better, losses, self.losses)
        return better


class BestPrompts:
    """For each example the prompt with the lowest objective so far. nan never wins."""

    def __init__(
        self, attack: AttackBase, objective: PromptObjective, images: Tensor, prompts: Sequence[str], eot: int
    ) -> None:
        self.attack, self.objective, self.images, self.eot = attack, objective, images, eot
        self.prompts, self.losses = list(prompts), self._score(prompts, None)

    def _score(self, prompts: Sequence[str], step: int | None) -> list[float]:
        losses = nan_to_inf(self.attack.score(self.objective(prompts), self.images, self.eot, step))
        return [float(loss) for loss in losses.tolist()]

    def update(self, prompts: Sequence[str], step: int) -> list[bool]:
        """Evaluate ``prompts`` and replace those that improved; returns for each whether it did."""
        losses = self._score(prompts, step)
        better = [new < old for new, old in zip(losses, self.losses, strict=True)]
        for i in (i for i, improved in enumerate(better) if improved):
            self.prompts[i], self.losses[i] = prompts[i], losses[i]
        return better


def nan_to_inf(losses: Tensor) -> Tensor:
    return torch.where(losses.isnan(), torch.full_like(losses, torch.inf), losses)


@dataclass
class Trace:
    """Loss curves and gradient statistics of one attack call, on the CPU. Call ``trace.attach(attack)`` first."""

    losses: list[Tensor] = field(default_factory=list)  # per step [B]
    gradient_norms: list[Tensor] = field(default_factory=list)  # per gradient step [B], l2
    nonfinite: list[Tensor] = field(default_factory=list)  # per gradient step [B], entries replaced by zero

    def attach(self, attack: object) -> bool:
        """Record ``attack``; False when it has no hooks (`AttackBase`)."""
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
