"""Defenses under evaluation, with their measured randomness, gradient and cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from codefend.bench.config import DefenseChoice
from codefend.bench.loaders import Loaders
from codefend.bench.results import BARE
from codefend.core.seeds import make_generator
from codefend.defense import Defense, StraightThrough
from codefend.purifiers.base import Purifier


@dataclass(frozen=True)
class EvaluatedDefense:
    """A defense with its measurements, made once per evaluation."""

    label: str
    defense: Defense
    randomized: bool
    gradient: str  # "exact", "straight-through" (BPDA), or "none needed" for the undefended victim
    cost: dict[str, Any]

    @property
    def differentiable(self) -> Defense:
        """The same function with a gradient, for white-box attacks: its own, or the identity's where it has none."""
        purifier = self.defense.purifier
        if purifier is None or self.gradient == "exact":
            return self.defense
        return replace(self.defense, purifier=StraightThrough(purifier))


def load_defense(label: str, loaders: Loaders) -> Defense:
    """The defense ``label`` as a config spells it: a purifier with options, ``+prompt=POLICY``, or both.

    Raises CodefendError for a malformed label, an unknown name or an option that it doesn't have.
    """
    choice = DefenseChoice.parse(label)
    policy = loaders.policy(choice.prompt) if choice.prompt else None
    purifier = None if choice.name == BARE else loaders.purifier(choice.name, **choice.options)
    return Defense(purifier, policy, label, choice.votes)


def evaluated_defense(label: str, loaders: Loaders, image: Tensor, seed: int = 0) -> EvaluatedDefense:
    """Load a defense and measure on ``image`` ``[1, 3, H, W]`` whether it is random and differentiable, and its cost.

    What a purifier declares (``stochastic``, ``differentiable``) counts only where it makes the attack stronger.
    """
    defense = load_defense(label, loaders)
    purifier = defense.purifier
    if purifier is None:
        gradient = "exact" if defense.policy else "none needed"
        return EvaluatedDefense(label, defense, False, gradient, _cost(None, image, seed))
    randomized = purifier.stochastic or is_random(purifier, image, seed)
    exact = purifier.differentiable and has_gradient(purifier, image, seed)
    gradient = "exact" if exact else "straight-through"
    cost = _cost(purifier, image, seed)
    for column in ("ms_per_image", "multiply_adds", "evaluations"):
        cost[column] *= defense.votes
    return EvaluatedDefense(label, defense, randomized, gradient, cost)


def is_random(purifier: Purifier, image: Tensor, seed: int) -> bool:
    """Whether two draws of noise give two images."""
    with torch.no_grad():
        first, second = (purifier(image, generator=make_generator(seed, "probe", i)) for i in range(2))
    return not torch.equal(first, second)


def has_gradient(purifier: Purifier, image: Tensor, seed: int) -> bool:
    """Whether a gradient reaches the input that isn't zero everywhere (rounding has one that is)."""
    image = image.clone().requires_grad_(True)
    with torch.enable_grad():
        purified = purifier(image, generator=make_generator(seed, "probe"))
        if not purified.requires_grad:
            return False
        weights = torch.rand(purified.shape, generator=make_generator(seed, "weights")).to(purified)
        (gradient,) = torch.autograd.grad((purified * weights).sum(), image, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def _cost(purifier: Purifier | None, image: Tensor, seed: int) -> dict[str, Any]:
    """Milliseconds (median of three after a warm-up) and multiply-adds for one image."""
    size = [int(image.shape[2]), int(image.shape[3])]
    if purifier is None:
        return {"ms_per_image": 0.0, "multiply_adds": 0, "evaluations": 0, "size": size}
    generator = make_generator(seed, "cost")
    with torch.no_grad():
        purifier(image, generator=generator)
        times = [_seconds(purifier, image, generator) for _ in range(3)]
    return {
        "ms_per_image": sorted(times)[1] * 1000,
        "multiply_adds": purifier.multiply_adds(*size),
        "evaluations": purifier.evaluations,
        "size": size,
        "threshold": None if purifier.detector is None else purifier.detector.limit,  # of `adaptive.detection_score`
    }


def _seconds(purifier: Purifier, image: Tensor, generator: Generator) -> float:
    start = time.perf_counter()
    purifier(image, generator=generator).cpu()  # waits for a GPU
    return time.perf_counter() - start
