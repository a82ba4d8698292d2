"""Bounds of attacks."""

from __future__ import annotations

import pytest
import torch

from attacks_kit import (
    sample_images,
)
from codefend.attacks.norms import excess
from codefend.attacks.pgd import PGD
from codefend.types import Budget


def test_excess_covers_every_kind_of_violation() -> None:
    clean, budget = sample_images(), Budget("linf", 8 / 255)
    assert excess(PGD(), clean, clean, budget).tolist() == [0, 0, 0]
    broken = clean.clone()
    broken[0, 0, 0, 0], broken[1, 0, 0, 0], broken[2, 0, 0, 0] = float("nan"), 1.5, (clean[2, 0, 0, 0] + 0.5) % 1
    distances = excess(PGD(), broken, clean, budget)
    assert distances[0] == torch.inf
    assert distances[1] >= 0.5
    assert distances[2] == pytest.approx(0.5 - 8 / 255, abs=1e-5)
