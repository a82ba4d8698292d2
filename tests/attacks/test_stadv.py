"""Spatial attack."""

from __future__ import annotations

import pytest
import torch

from attacks_kit import (
    objective_of,
    sample_images,
)
from codefend.attacks.norms import excess
from codefend.attacks.stadv import StAdv, roughness, warp
from codefend.types import Budget


def test_warp_moves_pixels_right_and_down() -> None:
    images, flow = sample_images(2, 8), torch.zeros(2, 2, 8, 8)
    assert torch.allclose(warp(images, flow), images, atol=1e-5)
    flow[:, 0] = 1
    assert torch.allclose(warp(images, flow)[..., :-1], images[..., 1:], atol=1e-5)
    flow[:, 0], flow[:, 1] = 0, 2
    assert torch.allclose(warp(images, flow)[..., :-2, :], images[..., 2:, :], atol=1e-5)


def test_roughness_is_zero_for_a_shift_and_counts_a_step() -> None:
    flow = torch.full((1, 2, 4, 4), 0.7)
    assert float(roughness(flow)) == pytest.approx(0.0, abs=1e-5)
    flow[:, 0, :, 2:] += 3.0  # one column of four steps of 3, of 12 pairs
    assert float(roughness(flow)) == pytest.approx(1.0, abs=1e-4)


def test_stadv_smooths_its_flow_and_checks_its_bound() -> None:
    clean, objective = sample_images(), objective_of()
    budget = Budget(steps=15)
    rough = StAdv(limit=0.1, tau=0.0)(objective, clean, budget)
    smooth = StAdv(limit=0.1, tau=5.0)(objective, clean, budget)
    assert objective(rough).mean() < objective(smooth).mean() < objective(clean).mean()
    attack = StAdv(limit=0.1)
    assert excess(attack, rough, clean, budget).max() == 0
    assert (attack.outside((clean + 0.3).clamp(0, 1), clean) > 0).any()
    assert torch.allclose(warp(clean, torch.zeros(3, 2, 16, 16)), StAdv(limit=0.0)(objective, clean, budget), atol=1e-5)
