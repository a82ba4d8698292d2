"""The low-frequency attack: its spectrum, and a purifier that it survives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from attacks_kit import ANSWERS, PROMPTS, ToyVictim, seeded
from codefend.attacks.low_frequency import LowFrequency, dct_matrix
from codefend.attacks.norms import distance
from codefend.attacks.objectives import untargeted
from codefend.attacks.pgd import PGD
from codefend.types import Budget, CodefendError

CLEAN = torch.full((3, 3, 32, 32), 0.5)  # no pixel is cut by the box


def energy_outside(delta: Tensor, count: int) -> Tensor:
    """Share of the squared l2 norm outside the ``count`` lowest frequencies along each side, ``[B]``."""
    basis = dct_matrix(delta.shape[-1], delta)
    spectrum = (basis @ delta @ basis.T).square().sum(1)
    return 1 - spectrum[:, :count, :count].sum((1, 2)) / spectrum.sum((1, 2))


@pytest.mark.parametrize(("norm", "eps", "most"), [("linf", 8 / 255, 0.15), ("l2", 0.5, 1e-5)])
def test_the_perturbation_holds_low_frequencies_and_the_budget(norm: str, eps: float, most: float) -> None:
    objective, budget = untargeted(ToyVictim(), PROMPTS, ANSWERS), Budget(norm, eps, 30)  # type: ignore[arg-type]
    low = LowFrequency(share=0.25)(objective, CLEAN, budget, generator=seeded())
    plain = PGD()(objective, CLEAN, budget, generator=seeded())
    assert (distance(low, CLEAN, budget.norm) <= eps + 1e-6).all()
    assert (objective(low) < objective(CLEAN) - 0.1).all()
    assert (energy_outside(low - CLEAN, 8) < most).all()  # 8 of 32 cosines; tanh adds a few harmonics in l-inf
    assert (energy_outside(plain - CLEAN, 8) > 0.5).all()


def test_it_survives_a_purifier_that_removes_high_frequencies() -> None:
    objective, budget = untargeted(ToyVictim(), PROMPTS, ANSWERS), Budget("linf", 8 / 255, 40)

    def blurred(images: Tensor) -> Tensor:
        return objective(interpolate(avg_pool2d(images, 4), scale_factor=4, mode="bilinear"))

    low = LowFrequency(share=0.25)(objective, CLEAN, budget, generator=seeded())
    plain = PGD()(objective, CLEAN, budget, generator=seeded())
    assert objective(plain).mean() < objective(low).mean()  # without a purifier plain steps are stronger
    assert (blurred(low) < blurred(plain) - 0.1).all()


def test_a_share_outside_its_range_is_an_error() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(CodefendError, match="share of attack 'low-frequency' is above 0, to 1"):
            LowFrequency(share=share)
