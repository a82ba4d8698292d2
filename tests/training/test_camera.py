"""What cameras and files leave in a picture: as much as they say, where they say, and in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from codefend.core.images import quantize8
from codefend.training.camera import MOST_NOISE, WAYS, jpeg_file, photographed, sensor_noise


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scenery() -> Tensor:
    """``[3, 40, 56]``: smooth but for one hard edge in colour."""
    rows, columns = torch.linspace(0, 1, 40)[:, None], torch.linspace(0, 1, 56)
    picture = torch.stack([rows * columns, 0.3 + 0.4 * rows.expand(40, 56), 0.8 - 0.5 * columns.expand(40, 56)])
    picture[0, :, 30:] = 0.9 - picture[0, :, 30:]
    return picture


def test_files_differ_and_keep_the_picture() -> None:
    picture, draw = scenery(), rng()
    coded = [jpeg_file(picture, draw) for _ in range(24)]
    assert all(c.shape == picture.shape and torch.equal(c, quantize8(c)) for c in coded)
    errors = [float((c - picture).square().mean().sqrt()) for c in coded]
    assert 0.5 / 255 < min(errors) < 0.5 * max(errors) < 8 / 255
    # Halved chroma bleeds over the edge; at 4:4:4 and a good quality it doesn't.
    bleeding = [float((c - picture)[0, :, 27:33].abs().mean()) for c in coded]
    assert max(bleeding) > 4 * min(bleeding)


def test_a_file_is_cut_out_anywhere_on_its_grid() -> None:
    ramp = torch.linspace(0.2, 0.8, 64).expand(3, 64, 64)
    draw = rng(3)
    steps = [(jpeg_file(ramp, draw).diff(dim=-1)).abs().mean((0, 1)) for _ in range(30)]
    strongest = {int(step[4:60].argmax() + 5) % 8 for step in steps}  # blocks show where they meet
    assert len(strongest) > 3


def test_noise_is_bounded_and_grows_with_the_light() -> None:
    dark, bright = torch.full((3, 64, 64), 0.1), torch.full((3, 64, 64), 0.9)
    sizes = {}
    for name, picture in (("dark", dark), ("bright", bright)):
        draw = rng(1)
        sizes[name] = [float((sensor_noise(picture, draw) - picture).square().mean().sqrt()) for _ in range(40)]
    assert max(sizes["bright"]) < 1.45 * MOST_NOISE
    assert np.mean(sizes["dark"]) < 0.85 * np.mean(sizes["bright"])
    assert min(sizes["bright"]) < 0.2 * MOST_NOISE < 0.8 * MOST_NOISE < max(sizes["bright"])


def test_some_noise_is_grey_and_some_is_coarse() -> None:
    draw, flat = rng(2), torch.full((3, 64, 64), 0.5)
    found = [sensor_noise(flat, draw) - flat for _ in range(40)]
    grey = [bool(torch.allclose(n[0], n[1]) and torch.allclose(n[1], n[2])) for n in found]
    assert 10 < sum(grey) < 30
    beside = [float((n[..., 1:] * n[..., :-1]).mean() / n.square().mean()) for n in found]
    assert min(beside) < 0.25 < 0.45 < max(beside)  # neighbours go together where it is coarse


def test_a_third_of_the_pictures_stays_as_it_is() -> None:
    pictures, draw = scenery().expand(90, 3, 40, 56), rng(4)
    kept = photographed(pictures, draw)
    assert torch.equal(kept, quantize8(kept))
    assert 18 <= int((kept == quantize8(pictures)).flatten(1).all(1).sum()) <= 42
    assert torch.equal(photographed(pictures, draw, WAYS[:1]), quantize8(pictures))


@pytest.mark.parametrize("height", [1, 5])
def test_tiny_pictures_have_a_camera_too(height: int) -> None:
    assert photographed(torch.rand(30, 3, height, 7), rng(5)).isfinite().all()
