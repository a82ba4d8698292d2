"""Norms: projection into the ball, and rounding to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks_kit import BUDGETS, both_norms, sample_images, seeded
from codefend.attacks.norms import descend, direction, distance, length, project, quantize_in_budget, random_start
from codefend.types import Budget


@both_norms
def test_projection_and_start_stay_in_the_ball(norm: str) -> None:
    clean, budget = sample_images(), BUDGETS[norm]
    for images in (torch.randn(clean.shape, generator=seeded()), random_start(clean, budget, generator=seeded())):
        inside = project(images, clean, budget)
        assert (distance(inside, clean, budget.norm) <= budget.eps + 1e-6).all()
        assert inside.min() >= 0
        assert inside.max() <= 1
        assert torch.allclose(project(inside, clean, budget), inside, atol=1e-6)


def test_directions_have_unit_norm_at_any_scale() -> None:
    grad = torch.randn(2, 3, 8, 8, generator=seeded())
    for scale in (1.0, 1e-30, 1e30):
        assert torch.allclose(length(direction(grad * scale, "l2"), "l2"), torch.ones(2), atol=1e-5)
        assert torch.equal(direction(grad * scale, "linf"), grad.sign())
    assert torch.equal(direction(torch.zeros_like(grad), "l2"), torch.zeros_like(grad))


def test_descend_takes_a_step_per_example() -> None:
    clean = torch.full((2, 3, 4, 4), 0.5)
    moved = descend(clean, torch.ones_like(clean), torch.tensor([0.01, 0.02]), clean, Budget("linf", 0.1))
    assert torch.allclose(moved.amax((1, 2, 3)), torch.tensor([0.49, 0.48]))


@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.sampled_from([0.0, 1 / 255, 2 / 255, 8 / 255]), st.floats(0, 1.5)),
    seed=st.integers(0, 2**20),
    reach=st.floats(0, 3),
)
def test_quantized_images_are_8_bit_and_in_budget(norm: Any, eps: float, seed: int, reach: float) -> None:
    clean, budget = sample_images(2, 8, seed), Budget(norm, eps)
    adv = project(clean + reach * eps * torch.randn(clean.shape, generator=seeded(seed)), clean, budget)
    rounded = quantize_in_budget(adv, clean, budget)
    levels = rounded * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert rounded.min() >= 0
    assert rounded.max() <= 1
    assert (distance(rounded, clean, norm) <= eps + 1e-6).all()
    assert torch.allclose(quantize_in_budget(rounded, clean, budget), rounded, atol=1e-6)
    if norm == "linf":
        assert ((rounded - adv).abs().amax() <= 0.5 / 255 + 1e-6) or eps * 255 % 1 > 0
    elif (distance((adv * 255).round() / 255, clean, norm) <= eps).all():
        assert torch.allclose(rounded, (adv * 255).round() / 255)


def test_quantizing_keeps_most_of_an_l2_perturbation() -> None:
    clean, budget = sample_images(4, 16), Budget("l2", 0.5)
    adv = random_start(clean, budget, generator=seeded())
    share = distance(quantize_in_budget(adv, clean, budget), clean, "l2") / distance(adv, clean, "l2")
    assert share.min() > 0.97


def test_quantizing_off_the_8_bit_grid_falls_back_to_the_rounded_clean() -> None:
    clean = torch.full((1, 3, 4, 4), 100.5 / 255)
    for budget in (Budget("linf", 0.1 / 255), Budget("l2", 1e-4)):
        levels = quantize_in_budget(clean, clean, budget) * 255
        assert torch.allclose(levels, torch.full_like(levels, 100.0))
