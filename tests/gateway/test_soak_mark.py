"""The mark by which the soak recognizes an original image at the upstream."""

from __future__ import annotations

import io
import random

import pytest
import torch
from benchmarks.gateway_hostile import MARK, SIDES, marked_image, survived
from PIL import Image

from codefend import purifiers
from codefend.core import images


def pixels_of(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def saved(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    assert MARK not in buffer.getvalue()
    return buffer.getvalue()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_an_original_is_recognized_in_another_file(kind: str, side: int) -> None:
    file = marked_image(random.Random(side), kind, side)
    assert survived(file)
    assert survived(saved(pixels_of(file)))
    assert survived(saved(pixels_of(file), "JPEG", quality=75))
    loaded = images.load(file + b"more", max_side=side // 2)
    assert survived(images.encode(loaded.pixels))
    assert survived(images.encode(loaded.pixels, "JPEG", quality=95))


@pytest.mark.parametrize("side", [32, 64, 200])
@pytest.mark.parametrize("name", ["bridge", "blur:sigma=2"])
def test_a_purified_image_is_not_taken_for_an_original(name: str, side: int) -> None:
    purifier = purifiers.load(name)
    for seed in range(3):
        pixels = images.load(marked_image(random.Random(seed), side=side)).pixels
        with torch.no_grad():
            purified = purifier(pixels[None], generator=torch.Generator().manual_seed(seed))[0]
        assert not survived(images.encode(purified))
        assert not survived(images.encode(purified, "JPEG", quality=95))
