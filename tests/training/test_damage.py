"""Random damage: every image changes, and stays in range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codefend.training.damage import Damage, add_fog, damage, occlude, warp_smoothly

IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [warp_smoothly, add_fog, occlude])
def test_damage_changes_every_image_and_stays_in_range(kind: Damage) -> None:
    changed = kind(IMAGES, np.random.default_rng(0))
    assert changed.shape == IMAGES.shape
    assert bool(((changed - IMAGES).abs().amax((1, 2, 3)) > 0.01).all())
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1


def test_all_kinds_of_damage_occur_and_repeat_from_the_seed() -> None:
    results = [damage(IMAGES, np.random.default_rng(seed)) for seed in range(12)]
    assert torch.equal(results[3], damage(IMAGES, np.random.default_rng(3)))
    shares = [float((result != IMAGES).float().mean()) for result in results]
    assert min(shares) < 0.2 < 0.8 < max(shares)  # a rectangle, or the whole image
