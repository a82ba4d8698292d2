"""Kernels are the libraries' own, and linear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from codefend.core.kernels import KERNELS, SPARSE, Kernel, matrix, resize

PILLOW = {
    "nearest-exact": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
    "bilinear-antialias": Image.Resampling.BILINEAR,
    "bicubic-antialias": Image.Resampling.BICUBIC,
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [(12, 20), (17, 13), (40, 64)])
def test_a_kernel_is_a_matrix_along_each_axis(kernel: Kernel, size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = matrix(kernel, 40, size[0]), matrix(kernel, 64, size[1])
    torch.testing.assert_close(rows @ image @ columns.T, resize(image, size, kernel))
    torch.testing.assert_close(rows.sum(1), torch.ones(size[0], dtype=torch.float64))


@pytest.mark.parametrize("kernel", PILLOW)
def test_pillow_shrinks_alike(kernel: Kernel) -> None:
    levels = np.random.default_rng(0).integers(60, 190, (96, 128, 3), dtype=np.uint8)  # no overshoot is clipped
    ours = resize(torch.from_numpy(levels).permute(2, 0, 1)[None].double(), (24, 32), kernel)[0]
    theirs = np.asarray(Image.fromarray(levels).resize((32, 24), PILLOW[kernel])).astype(float)
    assert abs(ours.permute(1, 2, 0).numpy() - theirs).max() <= 1


def test_opencvs_conventions() -> None:
    """INTER_NEAREST takes the first pixel of a cell, INTER_LINEAR the two around its centre."""
    assert matrix("nearest", 12, 3).argmax(1).tolist() == [0, 4, 8]
    assert matrix("bilinear", 12, 3).nonzero().tolist() == [[0, 1], [0, 2], [1, 5], [1, 6], [2, 9], [2, 10]]


def test_kernels_with_gaps_read_few_pixels_and_antialiased_ones_all() -> None:
    for kernel in KERNELS:
        read = matrix(kernel, 512, 64).ne(0).any(0).double().mean()
        assert (read <= 0.5) == (kernel in SPARSE)
        assert read in (1 / 8, 2 / 8, 4 / 8) or read > 0.99
