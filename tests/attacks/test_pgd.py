"""Projected gradient descent."""

from __future__ import annotations

from attacks_kit import (
    BUDGETS,
    ToyVictim,
    sample_images,
    seeded,
)
from codefend.attacks.base import Trace
from codefend.attacks.objectives import features_away
from codefend.attacks.pgd import PGD


def test_feature_attack_needs_its_random_start() -> None:
    clean = sample_images()
    objective = features_away(ToyVictim(), clean)
    trace, still = Trace(), PGD(random_start=False)
    trace.attach(still)
    still(objective, clean, BUDGETS["linf"])
    assert trace.gradient_norms[0].max() < 1e-4  # the clean image is the maximum
    assert (objective(PGD()(objective, clean, BUDGETS["linf"], generator=seeded())) < 0.99).all()
