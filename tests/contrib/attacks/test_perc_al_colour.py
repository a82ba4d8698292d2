"""Colour difference."""

from __future__ import annotations

import pytest
import torch

from attacks_kit import (
    sample_images,
    seeded,
)
from codefend.contrib.attacks.perc_al import ciede2000, lab

# (L, a, b) pairs and their CIEDE2000 from Sharma, Wu & Dalal 2005, Table 1
PAIRS = [
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, 3.1571, -77.2803), (50, 0, -82.7485), 2.8615),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
    ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
    ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


@pytest.mark.parametrize(("first", "second", "expected"), PAIRS)
def test_ciede2000_matches_the_published_pairs(
    first: tuple[float, ...], second: tuple[float, ...], expected: float
) -> None:
    a, b = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (first, second))
    assert float(ciede2000(a, b)) == pytest.approx(expected, abs=1e-4)
    assert float(ciede2000(b, a)) == pytest.approx(expected, abs=1e-4)


def test_colours_agree_with_scikit_image() -> None:
    from skimage import color

    first = sample_images(1, 24).double()
    second = (first + 0.1 * torch.randn(first.shape, generator=seeded(), dtype=torch.float64)).clamp(0, 1)
    theirs = [color.rgb2lab(x[0].permute(1, 2, 0).numpy()) for x in (first, second)]
    assert torch.allclose(lab(first)[0].permute(1, 2, 0), torch.from_numpy(theirs[0]), atol=0.02)
    expected = torch.from_numpy(color.deltaE_ciede2000(*theirs))
    assert torch.allclose(ciede2000(lab(first), lab(second))[0], expected, atol=0.02)


def test_colour_has_a_finite_slope_at_grey_black_and_no_difference() -> None:
    for level in (0.0, 0.5, 1.0):
        images = torch.full((1, 3, 2, 2), level, requires_grad=True)
        for other in (torch.full_like(images, level), sample_images(1, 2)):
            (grad,) = torch.autograd.grad(ciede2000(lab(images), lab(other)).sum(), images)
            assert grad.isfinite().all()
