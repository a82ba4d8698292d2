"""Photographs in tiles: no seam with the shipped weights, any size and aspect, and shrinking for servers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from codefend.purifiers import grid, load
from codefend.purifiers.base import Purifier


def photograph(height: int, width: int) -> Tensor:
    from skimage import data

    whole = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(whole, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


class Identity(Purifier):
    name = "identity"
    largest = 0

    def transform(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        self.largest = max(self.largest, images.shape[-1] * images.shape[-2])
        return images


def test_no_seam_with_the_shipped_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margin and overlap as shipped, tiles smaller so that more borders fit; attacked-like noise on a photograph."""
    image = photograph(304, 480)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).sign() * 8 / 255
    purifier = load("bridge", sigma=0.0)  # other noise would differ more than any seam
    for images in (image, (image + noise).clamp(0, 1)):
        whole = purifier(images)
        with monkeypatch.context() as patch:
            patch.setattr(grid, "TILED_ABOVE", 1)
            patch.setattr(grid, "TILE", 256)
            tiled = purifier(images)
        difference = (tiled - whole).abs().flatten()
        assert float(difference.max()) > 0  # it was tiled
        assert float(difference.quantile(0.999)) < 0.2 / 255  # 1 / 255 is what one could see
        assert float(difference.max()) < 0.6 / 255


@pytest.mark.parametrize("size", [(64, 64), (64, 6000), (3000, 40), (1999, 1201)])
def test_any_size_in_one_piece_and_bounded_tiles(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "TILED_ABOVE", 100_000)
    purifier, image = Identity(), torch.rand(1, 3, *size)
    assert torch.allclose(purifier(image), image, atol=1e-6)
    assert purifier.largest <= max(100_000, grid.TILE**2)


def test_every_pixel_is_covered_and_borders_are_never_used() -> None:
    for height, width in [(1024, 2048), (4000, 6000), (1040, 1936)]:
        covered = torch.zeros(1, 1, height, width)
        for top, bottom, left, right in grid.boxes(height, width):
            assert bottom - top <= grid.TILE
            assert top % 16 == left % 16 == 0  # on the networks' grid
            inner = [
                top + grid.MARGIN * (top > 0),
                bottom - grid.MARGIN * (bottom < height),
                left + grid.MARGIN * (left > 0),
                right - grid.MARGIN * (right < width),
            ]
            covered[..., inner[0] : inner[1], inner[2] : inner[3]] += 1
        assert bool((covered > 0).all())


def test_tiles_repeat_little_of_their_neighbours_work() -> None:
    for height, width in [(1536, 2048), (1280, 1792), (4000, 6000), (2048, 2048)]:
        area = sum((bottom - top) * (right - left) for top, bottom, left, right in grid.boxes(height, width))
        assert area < 1.45 * height * width


def test_gradient_passes_through_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "TILED_ABOVE", 1)
    monkeypatch.setattr(grid, "TILE", 256)
    image = torch.rand(1, 3, 300, 400, requires_grad=True)
    (grad,) = torch.autograd.grad(Identity()(image).sum(), image)
    assert torch.allclose(grad, torch.ones_like(grad), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((3000, 4000), 1024, (768, 1024)),
        ((4000, 3000), 1024, (1024, 768)),
        ((64, 64), 1024, (64, 64)),
        ((10, 5000), 100, (1, 100)),
        ((700, 900), None, (700, 900)),
    ],
)
def test_longest_side_is_limited_and_aspect_kept(
    size: tuple[int, int], longest: int | None, expected: tuple[int, int]
) -> None:
    image = Image.new("RGB", size[::-1], (64, 64, 64))
    shrunk = load("identity").purify(image, max_side=longest)
    assert shrunk.size == expected[::-1]
    assert shrunk.getextrema() == ((64, 64),) * 3


def test_pil_images_are_shrunk_with_their_alpha_channel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 4), dtype=np.uint8)
    out = load("identity").purify(Image.fromarray(pixels), max_side=45)
    assert (out.size, out.mode) == ((45, 30), "RGBA")
    assert load("identity").purify(Image.fromarray(pixels)).size == (90, 60)
