"""The attack in a training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from codefend.training.mining import sign_steps
from training_kit import generator

if TYPE_CHECKING:
    pass


def test_sign_steps_descend_inside_each_images_budget() -> None:
    clean = torch.rand(3, 3, 8, 8, generator=generator())
    eps = torch.tensor([1 / 255, 4 / 255, 16 / 255])
    weight = torch.randn(clean.shape, generator=generator(1))
    calls = []

    def objective(images: Tensor) -> Tensor:
        calls.append(images.requires_grad)
        return (weight * images).flatten(1).sum(1)

    attacked = sign_steps(objective, clean, eps=eps, steps=3, rel_step=1.0, generator=generator(2))
    distance = (attacked - clean).abs().flatten(1).amax(1)
    assert calls == [True] * 3  # one evaluation a step
    assert torch.allclose(distance, eps, atol=1e-6)
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    optimum = (clean - eps.view(-1, 1, 1, 1) * weight.sign()).clamp(0, 1)  # three steps of eps cross the whole ball
    assert torch.allclose(attacked, optimum, atol=1e-6)
