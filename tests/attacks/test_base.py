"""The base classes of attacks: hooks, gradients and the choice of the best images."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks_kit import (
    ANSWERS,
    BUDGETS,
    PROMPTS,
    CallCounter,
    ToyVictim,
    sample_images,
    seeded,
)
from codefend.attacks.apgd import APGD
from codefend.attacks.base import BestImages
from codefend.attacks.cw import CW
from codefend.attacks.mifgsm import MIFGSM
from codefend.attacks.objectives import targeted, untargeted
from codefend.attacks.pgd import PGD
from codefend.types import Budget, CodefendError


def test_a_missing_gradient_is_an_error_with_a_remedy() -> None:
    for objective in (lambda x: x.detach().flatten(1).sum(1), lambda x: torch.ones(3, requires_grad=True) * 2):
        with pytest.raises(CodefendError, match="StraightThrough"):
            PGD()(objective, sample_images(), BUDGETS["linf"])


def test_a_reduced_objective_is_an_error() -> None:
    with pytest.raises(ValueError, match="one number per image"):
        PGD()(lambda x: x.sum(), sample_images(), BUDGETS["linf"])


def test_the_best_images_are_returned_not_the_last() -> None:
    clean = torch.full((2, 3, 4, 4), 0.5)
    recorded: list[Tensor] = []

    def misleading(images: Tensor) -> Tensor:  # lowest at 0.45, but its gradient leads on to 0.4
        mean = images.flatten(1).mean(1)
        losses = (mean - 0.45).abs().detach() + mean - mean.detach()
        recorded.append(losses.detach())
        return losses

    adv = PGD(random_start=False, rel_step=1.0)(misleading, clean, Budget("linf", 0.1, 10))
    assert torch.allclose(adv, torch.full_like(adv, 0.45))
    assert (recorded[-1] > 0.049).all()


def test_with_eot_a_lucky_sample_does_not_win() -> None:
    # Every draw adds heavy noise; only moving the mean truly helps. One sample picks luck, many pick progress.
    noise = seeded(5)
    clean = torch.full((16, 3, 4, 4), 0.5)

    def noisy(images: Tensor) -> Tensor:
        return images.flatten(1).mean(1) + 0.1 * torch.randn(len(images), generator=noise)

    def truth(eot: int) -> float:
        adv = PGD(rel_step=1.0, random_start=False)(noisy, clean, Budget("linf", 0.1, 20, eot=eot), generator=seeded(1))
        return float(adv.mean())

    assert truth(1) > 0.42  # the path runs evenly from 0.5 down to 0.4
    assert truth(16) < 0.415


def test_eot_takes_that_many_samples_per_step() -> None:
    counted = CallCounter(untargeted(ToyVictim(), PROMPTS, ANSWERS))
    PGD()(counted, sample_images(), Budget("linf", 8 / 255, 10, eot=4), generator=seeded())
    assert counted.calls == 4 * (1 + 10 + 1 + 2)  # clean, steps, last iterate, two finalists


def test_best_images_prefer_finite_and_lower_losses() -> None:
    best = BestImages(torch.zeros(3, 1, 1, 1), torch.tensor([1.0, math.nan, 1.0]))
    improved = best.update(torch.ones(3, 1, 1, 1), torch.tensor([0.5, 2.0, math.nan]))
    assert improved.tolist() == [True, True, False]
    assert best.images.flatten().tolist() == [1, 1, 0]


def test_gradient_memory_holds_one_sample() -> None:
    alive: list[int] = []
    live = 0

    class Tracked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor) -> Tensor:
            nonlocal live
            live += 1
            alive.append(live)
            return images * 1.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal live
            live -= 1
            return grad

    objective = targeted(ToyVictim(), PROMPTS, ANSWERS)
    graded = CallCounter(lambda x: objective(Tracked.apply(x)) if x.requires_grad else objective(x))  # type: ignore[no-untyped-call]
    for attack in (PGD(), APGD(), MIFGSM(), CW()):
        attack(graded, sample_images(), Budget("linf", 8 / 255, 5, eot=3), generator=seeded())
    assert max(alive) == 1
    assert live == 0


def test_score_averages_and_reports_to_the_hook() -> None:
    attack, heard = PGD(), []
    attack.on_step = lambda step, losses: heard.append((step, losses))
    values = iter([torch.tensor([0.0]), torch.tensor([1.0])])
    losses = attack.score(lambda x: next(values), torch.zeros(1, 3, 2, 2), 2, step=7)
    assert losses.tolist() == [0.5]
    assert heard[0][0] == 7
