"""Universal perturbation."""

from __future__ import annotations

import torch

from attacks_kit import (
    BUDGETS,
    PROMPTS,
    ToyVictim,
    both_norms,
    sample_images,
    seeded,
)
from codefend.attacks.norms import distance, length
from codefend.attacks.objectives import targeted
from codefend.contrib.attacks.universal import UniversalPerturbation
from codefend.types import Budget


@both_norms
def test_universal_delta_is_one_for_all_and_in_budget(norm: str) -> None:
    victim, budget = ToyVictim(), BUDGETS[norm]
    batches = [(targeted(victim, PROMPTS, ["target"] * 3), sample_images(seed=s)) for s in range(4)]
    attack = UniversalPerturbation()
    delta = attack.fit(batches, Budget(budget.norm, budget.eps, 40), generator=seeded())
    assert delta.shape == (1, 3, 16, 16)
    assert (length(delta, budget.norm) <= budget.eps + 1e-6).all()
    held_out = sample_images(seed=99)
    objective = targeted(victim, PROMPTS, ["target"] * 3)
    assert objective(attack.apply(held_out, delta)).mean() < objective(held_out).mean()
    adv = attack(objective, held_out, budget, generator=seeded())
    assert (distance(adv, held_out, budget.norm) <= budget.eps + 1e-6).all()
    assert objective(adv).mean() <= objective(held_out).mean()
    assert torch.equal(attack(objective, held_out, Budget(budget.norm, 0.0)), held_out)
