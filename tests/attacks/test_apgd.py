"""Auto-PGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attacks_kit import (
    ANSWERS,
    PROMPTS,
    Noisy,
    ToyVictim,
    both_norms,
    sample_images,
    seeded,
    setup,
)
from codefend.attacks import ATTACKS
from codefend.attacks.apgd import APGD, checkpoints
from codefend.attacks.objectives import untargeted
from codefend.attacks.pgd import PGD, PGDDecay
from codefend.defense import DefendedVictim, Defense
from codefend.types import Budget, Objective


def test_checkpoints_match_the_paper() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000)[0] == 220


def rugged(seed: int, width: int = 3 * 8 * 8) -> Objective:
    """A valley with ripples: the slope leads down, its walls need smaller steps, and there are local minima."""
    generator = seeded(seed)
    centre = 0.5 + 0.08 * (torch.rand(width, generator=generator) - 0.5)
    mix = torch.randn(width, width, generator=generator) / width**0.5

    def objective(images: Tensor) -> Tensor:
        away = (images.flatten(1) - centre) @ mix * 30
        ripples: Tensor = away.square() + 1 - (3 * away).cos()
        return ripples.mean(1)

    return objective


def noisy_deficit(steps: int, sigma: float) -> float:
    """Mean objective on fresh noise of APGD's images less that of PGD's, on ripples behind noise."""
    clean, budget, deficits = torch.full((6, 3, 8, 8), 0.5), Budget("linf", 8 / 255, steps, eot=2), []
    for seed in range(4):
        objective, values = rugged(seed), []
        for attack in (APGD(), PGD()):
            noise, fresh = Noisy(sigma), seeded(99)
            draws = seeded(seed + 50)
            adv = attack(lambda x: objective(noise(x, generator=draws)), clean, budget, generator=seeded(seed))  # noqa: B023
            values.append(float(torch.stack([objective(noise(adv, generator=fresh)) for _ in range(100)]).mean()))
        deficits.append(values[0] - values[1])
    return sum(deficits) / len(deficits)


@pytest.mark.parametrize(("steps", "sigma"), [(8, 0.01), (8, 0.03)])
def test_apgd_is_at_least_as_good_as_pgd_on_a_stochastic_objective(steps: int, sigma: float) -> None:
    """With the paper's step rule it falls behind by .10 and .09."""
    assert noisy_deficit(steps, sigma) < 0.01


def test_a_deterministic_objective_keeps_the_published_rule_whatever_the_samples() -> None:
    objective, clean = rugged(1), torch.full((2, 3, 8, 8), 0.5)
    once, thrice = (
        APGD()(objective, clean, Budget("linf", 8 / 255, 12, eot=eot), generator=seeded()) for eot in (1, 4)
    )
    assert torch.equal(once, thrice)


@both_norms
def test_apgd_is_at_least_as_good_as_pgd(norm: Any) -> None:
    clean = torch.full((8, 3, 8, 8), 0.5)
    budget = Budget(norm, 8 / 255 if norm == "linf" else 0.4, 60)
    gains = []
    for seed in range(6):
        objective = rugged(seed)
        apgd = objective(APGD()(objective, clean, budget, generator=seeded(seed)))
        pgd = objective(PGD()(objective, clean, budget, generator=seeded(seed)))
        gains.append(float((pgd - apgd).mean()))
    assert sum(gains) >= 0
    assert sum(g >= 0 for g in gains) >= 5


@pytest.mark.parametrize("cls", [PGD, APGD])
def test_restarts_never_hurt(cls: type[PGD] | type[APGD]) -> None:
    objective, clean = rugged(3), torch.full((4, 3, 8, 8), 0.5)
    budget = Budget("linf", 8 / 255, 8)
    once = objective(cls()(objective, clean, budget, generator=seeded()))
    thrice = objective(cls(restarts=3)(objective, clean, budget, generator=seeded()))
    assert (thrice <= once + 1e-7).all()
    assert thrice.mean() < once.mean()


def test_more_steps_do_not_hurt_apgd() -> None:
    objective, clean = setup(ATTACKS["apgd"])
    losses = [
        float(objective(APGD()(objective, clean, Budget("linf", 4 / 255, n), generator=seeded())).mean())
        for n in (5, 20, 80)
    ]
    assert losses[0] >= losses[1] - 1e-3
    assert losses[1] >= losses[2] - 1e-3


@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_noise_does_not_stall_apgd(sigma: float) -> None:
    """With the paper's rule it fell behind PGD with steps that fall linearly by .02 and .07."""
    deficits = []
    for seed in range(3):
        clean, prompts, answers = sample_images(6, seed=seed + 10), PROMPTS * 2, ANSWERS * 2
        defense, budget = Defense(Noisy(sigma), name="noisy"), Budget("linf", 4 / 255, 40, eot=2)

        def loss(attack: Any) -> float:
            objectives = [
                untargeted(DefendedVictim(ToyVictim(seed), defense, generator=seeded(s)), prompts, answers)  # noqa: B023
                for s in (seed, 99)  # noqa: B023
            ]
            adv = attack(objectives[0], clean, budget, generator=seeded(seed))  # noqa: B023
            return float(torch.stack([objectives[1](adv) for _ in range(60)]).mean())

        deficits.append(loss(APGD()) - loss(PGDDecay()))
    assert sum(deficits) / len(deficits) < 0.02
