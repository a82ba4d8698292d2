"""Training images of any size: shares, sizes and seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from codefend.tasks.natural_images import NaturalConfig, NaturalImages, random_crop
from codefend.types import CodefendError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> NaturalConfig:
    return NaturalConfig(canvases=1, cache=str(tmp_path_factory.mktemp("leaves") / "canvases.safetensors"))


def test_images_have_any_size_and_repeat_by_seed_and_number(config: NaturalConfig) -> None:
    source = NaturalImages(config, first_scene=0)
    first, again = (source.draw(np.random.default_rng(5), 6, 64, number=2) for _ in range(2))
    assert first.shape == (6, 3, 64, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, source.draw(np.random.default_rng(6), 6, 64, number=2))


def test_batches_share_no_scene(config: NaturalConfig) -> None:
    source = NaturalImages(replace(config, shares=(0, 0, 1)), first_scene=0)
    first, second = (source.draw(np.random.default_rng(5), 2, 128, number=number) for number in (0, 1))
    images = [*first, *second]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_dead_leaves_are_not_drawn_without_a_share(tmp_path: Path) -> None:
    cache = tmp_path / "canvases.safetensors"
    NaturalImages(NaturalConfig(shares=(0, 1, 0), cache=str(cache)), first_scene=0)
    assert not cache.exists()


@pytest.mark.parametrize("shares", [(1.0, 1.0), (-1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_impossible_shares_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(CodefendError, match="three numbers"):
        NaturalConfig(shares=shares)


def test_a_crop_of_8_bits_equals_that_of_floats() -> None:
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = [random_crop(np.random.default_rng(3), x, 64) for x in (image, image.float() / 255)]
    assert crops[0].shape == (3, 64, 64)
    assert torch.equal(*crops)
