"""Objectives: images ``[B, 3, H, W]`` -> ``[B]``, lower is better for the attacker.

Each is made from a victim, bare or defended: an attack never knows which, nor that a language model is behind it.
The batch is fixed when the objective is made: prompts, answers and reference images line up with the images' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from codefend.types import Objective, UserError, Victim, WhiteBox


def untargeted(victim: WhiteBox, prompts: Sequence[str], answers: Sequence[str]) -> Objective:
    """Minus the mean negative log-likelihood (nats per token) of the true answer: make it unlikely."""
    _check_rows(prompts, answers)

    def objective(images: Tensor) -> Tensor:
        return -victim.loss(images, prompts, answers)

    return objective


def targeted(victim: WhiteBox, prompts: Sequence[str], targets: Sequence[str]) -> Objective:
    """Mean negative log-likelihood (nats per token) of the attacker's sentence: make it likely."""
    _check_rows(prompts, targets)

    def objective(images: Tensor) -> Tensor:
        return victim.loss(images, prompts, targets)

    return objective


def features_away(victim: WhiteBox, clean_images: Tensor, *, reference: WhiteBox | None = None) -> Objective:
    """Mean cosine in [-1, 1] of all vision tokens to those of the clean image (VEAttack, ICLR 2026).

    ``reference`` gives the clean tokens; by default the attacked victim itself. The gradient is zero at the clean
    image when both are the same and deterministic: start from a random point.
    """
    with torch.no_grad():
        clean_tokens = (reference or victim).features(clean_images)

    def objective(images: Tensor) -> Tensor:
        return cosine_similarity(victim.features(images), clean_tokens, dim=-1).mean(1)

    return objective


def features_towards(victim: WhiteBox, target_images: Tensor, *, reference: WhiteBox | None = None) -> Objective:
    """Minus the mean cosine of all vision tokens to those of a target image (AttackVLM's MF-ii, Zhao et al. 2023).

    ``target_images`` is ``[B, 3, H, W]``, or ``[1, 3, H, W]`` for one target shared by the batch.
    """
    with torch.no_grad():
        target_tokens = (reference or victim).features(target_images)

    def objective(images: Tensor) -> Tensor:
        return -cosine_similarity(victim.features(images), target_tokens, dim=-1).mean(1)

    return objective


def answers_scored(
    victim: Victim, prompts: Sequence[str], judge: Callable[[Sequence[str]], Sequence[float] | Tensor]
) -> Objective:
    """``judge`` of the generated answers, for victims that only answer text: score attacks only, no gradient."""

    def objective(images: Tensor) -> Tensor:
        scores = judge(victim.generate(images, prompts))
        return torch.as_tensor(scores, dtype=images.dtype, device=images.device)

    return objective


def eot(objective: Objective, n: int) -> Objective:
    """Mean over ``n`` evaluations of a stochastic objective (Athalye et al. 2018, expectation over transformation).

    Its gradient holds ``n`` graphs at once; attacks use ``Budget.eot`` instead, which holds one.
    """

    def mean(images: Tensor) -> Tensor:
        return torch.stack([objective(images) for _ in range(n)]).mean(0)

    return mean


class Counted:
    """An objective that counts how often it was asked: ``calls``, each of one batch."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.calls = objective, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.objective(images)


def _check_rows(prompts: Sequence[str], texts: Sequence[str]) -> None:
    if len(prompts) != len(texts):
        raise UserError(f"{len(prompts)} prompts but {len(texts)} answers: give one of each per image")
