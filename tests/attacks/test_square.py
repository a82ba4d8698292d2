"""Square attack, and tests of all score attacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attacks_kit import (
    ANSWERS,
    PROMPTS,
    CallCounter,
    ToyVictim,
    sample_images,
    seeded,
    setup,
)
from codefend.attacks import ATTACKS
from codefend.attacks.apgd import APGD
from codefend.attacks.norms import distance
from codefend.attacks.objectives import untargeted
from codefend.attacks.square import SquareAttack, pyramid
from codefend.contrib.attacks.rgf import RGF, SPSA
from codefend.types import Budget


def test_white_box_beats_score_only() -> None:
    objective, clean = setup(ATTACKS["apgd"])
    apgd = objective(APGD()(objective, clean, Budget("linf", 8 / 255, 30), generator=seeded())).mean()
    for attack in (SquareAttack(), RGF(), SPSA()):
        assert apgd <= objective(attack(objective, clean, Budget("linf", 8 / 255, 200), generator=seeded())).mean()


@pytest.mark.parametrize("side", [2, 3, 5, 8])
def test_square_pyramid_has_unit_norm_and_two_signs(side: int) -> None:
    eta = pyramid(side, torch.zeros(1))
    assert eta.shape == (side, side)
    assert float(eta.norm()) == pytest.approx(1.0)
    assert eta.min() < 0 < eta.max()


@pytest.mark.parametrize("size", [3, 5, 8])
def test_square_takes_tiny_images(size: int) -> None:
    clean = sample_images(2, size)
    for budget in (Budget("linf", 8 / 255, 30), Budget("l2", 0.3, 30)):
        adv = SquareAttack()(lambda x: x.flatten(1).mean(1), clean, budget, generator=seeded())
        assert (distance(adv, clean, budget.norm) <= budget.eps + 1e-6).all()
        assert adv.mean() < clean.mean()


@pytest.mark.parametrize("attack", [SquareAttack(), RGF(), SPSA()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("queries", [50, 333])
def test_score_attacks_use_their_queries_and_no_gradient(attack: Any, queries: int) -> None:
    counted = CallCounter(untargeted(ToyVictim(), PROMPTS, ANSWERS))

    def black_box(images: Tensor) -> Tensor:
        assert not images.requires_grad
        return counted(images).detach()

    attack(black_box, sample_images(), Budget("linf", 8 / 255, queries), generator=seeded())
    assert 0.7 * queries <= counted.calls <= queries + 2
