"""Sensor noise and JPEG artefacts: their size, their place, and 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from codefend.core.images import quantize8
from codefend.training.camera import AUGMENTATIONS, MAX_NOISE, augment_camera, jpeg_file, sensor_noise


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scene() -> Tensor:
    """``[3, 40, 56]``: smooth except for one hard edge in red."""
    rows, columns = torch.linspace(0, 1, 40)[:, None], torch.linspace(0, 1, 56)
    image = torch.stack([rows * columns, 0.3 + 0.4 * rows.expand(40, 56), 0.8 - 0.5 * columns.expand(40, 56)])
    image[0, :, 30:] = 0.9 - image[0, :, 30:]
    return image


def test_files_differ_and_preserve_the_image() -> None:
    image, draw = scene(), rng()
    decoded = [jpeg_file(image, draw) for _ in range(24)]
    assert all(d.shape == image.shape and torch.equal(d, quantize8(d)) for d in decoded)
    errors = [float((d - image).square().mean().sqrt()) for d in decoded]
    assert 0.5 / 255 < min(errors) < 0.5 * max(errors) < 8 / 255
    # Halved chroma bleeds over the edge; at 4:4:4 and a good quality it doesn't.
    bleeding = [float((d - image)[0, :, 27:33].abs().mean()) for d in decoded]
    assert max(bleeding) > 4 * min(bleeding)


def test_a_file_has_a_random_offset_of_its_grid() -> None:
    ramp = torch.linspace(0.2, 0.8, 64).expand(3, 64, 64)
    draw = rng(3)
    steps = [(jpeg_file(ramp, draw).diff(dim=-1)).abs().mean((0, 1)) for _ in range(30)]
    strongest = {int(step[4:60].argmax() + 5) % 8 for step in steps}  # at the borders of blocks
    assert len(strongest) > 3


def test_noise_is_bounded_and_grows_with_the_signal() -> None:
    dark, bright = torch.full((3, 64, 64), 0.1), torch.full((3, 64, 64), 0.9)
    sizes = {}
    for name, image in (("dark", dark), ("bright", bright)):
        draw = rng(1)
        sizes[name] = [float((sensor_noise(image, draw) - image).square().mean().sqrt()) for _ in range(40)]
    assert max(sizes["bright"]) < 1.45 * MAX_NOISE
    assert np.mean(sizes["dark"]) < 0.85 * np.mean(sizes["bright"])
    assert min(sizes["bright"]) < 0.2 * MAX_NOISE < 0.8 * MAX_NOISE < max(sizes["bright"])


def test_some_noise_is_grey_and_some_is_coarse() -> None:
    draw, flat = rng(2), torch.full((3, 64, 64), 0.5)
    noises = [sensor_noise(flat, draw) - flat for _ in range(40)]
    grey = [bool(torch.allclose(n[0], n[1]) and torch.allclose(n[1], n[2])) for n in noises]
    assert 10 < sum(grey) < 30
    correlations = [float((n[..., 1:] * n[..., :-1]).mean() / n.square().mean()) for n in noises]
    assert min(correlations) < 0.25 < 0.45 < max(correlations)  # of neighbours, high where the noise is coarse


def test_a_third_of_the_images_is_unchanged() -> None:
    images, draw = scene().expand(90, 3, 40, 56), rng(4)
    augmented = augment_camera(images, draw)
    assert torch.equal(augmented, quantize8(augmented))
    assert 18 <= int((augmented == quantize8(images)).flatten(1).all(1).sum()) <= 42
    assert torch.equal(augment_camera(images, draw, AUGMENTATIONS[:1]), quantize8(images))


@pytest.mark.parametrize("height", [1, 5])
def test_tiny_images_can_be_augmented(height: int) -> None:
    assert augment_camera(torch.rand(30, 3, height, 7), rng(5)).isfinite().all()
