"""Adversarial patch."""

from __future__ import annotations

import torch

from attacks_kit import (
    ANSWERS,
    PROMPTS,
    ToyVictim,
    sample_images,
    seeded,
)
from codefend.attacks.objectives import untargeted
from codefend.attacks.patch import AdversarialPatch
from codefend.types import Budget


def test_a_patch_changes_its_square_only_and_lowers_the_objective() -> None:
    clean, victim = sample_images(), ToyVictim()
    objective = untargeted(victim, PROMPTS, ANSWERS)
    attack, budget = AdversarialPatch(side=0.4), Budget(steps=20)
    adv = attack(objective, clean, budget, generator=seeded())
    mask = attack.mask(clean, generator=seeded())
    assert mask.flatten(1).sum(1).tolist() == [36, 36, 36]  # 0.4 of 16 is 6
    assert torch.equal(adv * (1 - mask), clean * (1 - mask))
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert (objective(adv) < objective(clean)).all()
    fixed = AdversarialPatch(side=0.25, place=(0.0, 1.0)).mask(clean)
    assert fixed[0, 0, :4, 12:].all()
    assert fixed.sum() == 3 * 16


def test_a_patch_checks_its_bound() -> None:
    clean, attack = sample_images(), AdversarialPatch(side=0.25)
    one, two = clean.clone(), clean.clone()
    one[:, :, 3:7, 5:9] = 1 - one[:, :, 3:7, 5:9]
    two[:, :, 3, 2] = 1 - two[:, :, 3, 2]
    two[:, :, 3, 9] = 1 - two[:, :, 3, 9]
    assert attack.outside(clean, clean).tolist() == [0, 0, 0]
    assert attack.outside(one, clean).tolist() == [0, 0, 0]
    assert attack.outside(two, clean).tolist() == [4, 4, 4]  # 8 wide, 4 allowed
