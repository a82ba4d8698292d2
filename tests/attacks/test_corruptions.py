"""Common corruptions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from attacks_kit import (
    objective_of,
    sample_images,
    seeded,
)
from codefend.attacks.corruptions import KINDS, Corruption, corrupt
from codefend.types import Budget, CodefendError


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_grow_with_severity_and_stay_in_range(kind: str) -> None:
    images = interpolate(sample_images(2, 16), scale_factor=4, mode="bilinear")
    levels = [corrupt(images, kind, severity, generator=seeded()) for severity in range(1, 6)]
    assert all(x.shape == images.shape and x.min() >= 0 and x.max() <= 1 for x in levels)
    damage = [float((x - images).square().mean()) for x in levels]
    assert damage[0] > 0
    # Saturation first falls and then rises; on small images the blurs of neighbouring levels are equal.
    assert damage[4] >= damage[0] or kind == "saturate"
    assert torch.equal(corrupt(images, kind, 3, generator=seeded()), levels[2])


def test_brightness_and_saturation_change_hsv() -> None:
    colour = torch.tensor([0.6, 0.3, 0.15]).view(1, 3, 1, 1)
    brighter = corrupt(colour, "brightness", 2)  # value 0.6 -> 0.8, hue and saturation unchanged
    assert torch.allclose(brighter.flatten(), torch.tensor([0.8, 0.4, 0.2]), atol=1e-5)
    duller = corrupt(colour, "saturate", 1)  # saturation 0.75 -> 0.225
    assert torch.allclose(
        duller.flatten(), torch.tensor([0.6, 0.6 * (1 - 0.225 * 2 / 3), 0.6 * (1 - 0.225)]), atol=1e-5
    )


def test_blur_leaves_a_flat_image_unchanged() -> None:
    flat = torch.full((1, 3, 20, 20), 0.3)
    for kind in ("gaussian-blur", "defocus-blur", "motion-blur", "pixelate"):
        assert torch.allclose(corrupt(flat, kind, 5), flat, atol=1e-5)


def test_one_corruption_is_always_applied_and_worst_takes_the_worst() -> None:
    clean, objective = sample_images(), objective_of()
    single = Corruption(kind="contrast")(objective, clean, Budget(), generator=seeded())
    assert torch.equal(single, corrupt(clean, "contrast", 3))
    worst = objective(Corruption()(objective, clean, Budget(), generator=seeded()))
    assert (worst <= objective(single) + 1e-6).all()
    assert (worst <= objective(clean) + 1e-6).all()


@pytest.mark.parametrize(("kind", "severity"), [("snow", 1), ("contrast", 6)])
def test_an_unknown_corruption_is_an_error(kind: str, severity: int) -> None:
    with pytest.raises(CodefendError, match="severity 1 to 5"):
        corrupt(sample_images(), kind, severity)
