"""Transfer attacks with momentum."""

from __future__ import annotations

import torch

from attacks_kit import (
    sample_images,
    seeded,
)
from codefend.attacks.mifgsm import diversify


def test_diversify_keeps_the_shape_and_the_gradient() -> None:
    clean = sample_images().requires_grad_(True)
    resized = diversify(clean, 0.5, seeded())
    assert resized.shape == clean.shape
    assert not torch.equal(resized, clean)
    (grad,) = torch.autograd.grad(resized.sum(), clean)
    assert (grad != 0).float().mean() > 0.2
