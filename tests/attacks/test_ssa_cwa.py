"""SSA-CWA."""

from __future__ import annotations

import pytest
import torch

from attacks_kit import (
    CallCounter,
    ToyVictim,
    objective_of,
    sample_images,
    seeded,
)
from codefend.attacks.low_frequency import dct_matrix
from codefend.attacks.objectives import Ensemble
from codefend.attacks.ssa_cwa import SSACWA, simulate_spectrum
from codefend.types import Budget


def test_the_spectrum_is_unchanged_without_mask_and_noise() -> None:
    images = sample_images(2, 12)
    assert torch.allclose(simulate_spectrum(images, 0.0, 0.0, seeded()), images, atol=1e-5)
    moved = simulate_spectrum(images, 0.0, 0.5, seeded())
    gain = (dct_matrix(12, images) @ moved @ dct_matrix(12, images).T) / (
        dct_matrix(12, images) @ images @ dct_matrix(12, images).T
    )
    assert gain.median() == pytest.approx(1.0, abs=0.05)
    assert ((gain > 0.49) & (gain < 1.51)).float().mean() > 0.99  # up to rounding where the spectrum is near 0


def test_ssa_cwa_attacks_every_model_of_an_ensemble() -> None:
    clean = sample_images()
    models = [CallCounter(objective_of(ToyVictim(seed))) for seed in range(3)]
    adv = SSACWA(samples=2, rel_step=0.2)(Ensemble(models), clean, Budget("linf", 8 / 255, 8), generator=seeded())
    # Clean image, one look per step, and two samples per step for each part.
    assert [model.calls for model in models] == [1 + 8 + 8 * 2] * 3
    assert all((model(adv) < model(clean)).all() for model in models)
