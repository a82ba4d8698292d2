"""PerC-AL."""

from __future__ import annotations

import torch

from attacks_kit import (
    objective_of,
    sample_images,
    seeded,
)
from codefend.attacks.norms import excess, quantize_attacked
from codefend.contrib.attacks.perc_al import PerCAL, colour_distance, shrink
from codefend.types import Budget


def test_perc_al_uses_its_bound_and_stays_inside() -> None:
    clean, objective = sample_images(), objective_of()
    losses = []
    for limit in (1.0, 4.0):
        attack = PerCAL(limit=limit, step_size=8 / 255)
        adv = attack(objective, clean, Budget(steps=20), generator=seeded())
        distances = colour_distance(adv, clean)
        assert (distances <= limit + 1e-4).all()
        assert (distances > 0.3 * limit).all()
        assert excess(attack, quantize_attacked(attack, adv, clean, Budget()), clean, Budget()).max() == 0
        losses.append(objective(adv))
    assert (losses[1] < losses[0]).all()
    assert (PerCAL(limit=1.0).outside(adv, clean) > 0).any()


def test_shrink_reaches_the_bound_from_outside() -> None:
    clean = sample_images()
    far = (clean + 0.2 * torch.randn(clean.shape, generator=seeded())).clamp(0, 1)
    distances = colour_distance(shrink(far, clean, 2.0), clean)
    assert ((distances <= 2.0) & (distances > 1.95)).all()
    assert torch.equal(shrink(far, clean, 1e3), far)
