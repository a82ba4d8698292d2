"""Differentiable preprocessing against the library's own image processors: equal to the level, and smooth."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codefend.types import CodefendError
from codefend.victims.hf.pixels import FAMILIES, pixel_values
from codefend.victims.hf.resample import FILTERS, Levels

TINY, SMALL = {"height": 28, "width": 28}, {"height": 56, "width": 56}
GRID = [[56, 56], [56, 112], [112, 56], [112, 112]]
SCAN = {"min_crop_size": 16, "max_num_crops": 4, "min_ratio_to_activate": 1.2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "CLIP": ("clip", "CLIP", {"size": {"shortest_edge": 56}, "crop_size": SMALL}),
    "CLIP, crop larger than the image": (
        "clip",
        "CLIP",
        {"do_resize": False, "crop_size": {"height": 51, "width": 77}},
    ),
    "SigLIP": ("siglip", "Siglip", {"size": SMALL}),
    "SigLIP, reduced": ("siglip", "Siglip", {"size": TINY}),
    "BLIP": ("blip", "Blip", {"size": SMALL}),
    "LLaVA": ("llava", "Llava", {"size": {"shortest_edge": 56}, "crop_size": SMALL}),
    "LLaVA, padded": ("llava", "Llava", {"do_pad": True, "size": {"shortest_edge": 56}, "crop_size": SMALL}),
    "LLaVA-NeXT": (
        "llava_next",
        "LlavaNext",
        {"size": {"shortest_edge": 56}, "crop_size": SMALL, "image_grid_pinpoints": GRID},
    ),
    "LLaVA-OneVision": ("llava_onevision", "LlavaOnevision", {"size": SMALL, "image_grid_pinpoints": GRID}),
    "Qwen2.5-VL": ("qwen2_vl", "Qwen2VL", {"size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}}),
    "Qwen3-VL": ("qwen2_vl", "Qwen2VL", {"patch_size": 16, "size": {"shortest_edge": 128**2, "longest_edge": 256**2}}),
    "Idefics3": ("idefics3", "Idefics3", {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}}),
    "SmolVLM": ("smolvlm", "SmolVLM", {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}),
    "SmolVLM, whole": (
        "smolvlm",
        "SmolVLM",
        {"do_image_splitting": False, "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
    ),
    "InternVL": ("got_ocr2", "GotOcr2", {"size": TINY, "crop_to_patches": True, "max_patches": 6}),
    "InternVL, whole": ("got_ocr2", "GotOcr2", {"size": SMALL}),
    "Gemma 3": ("gemma3", "Gemma3", {"size": SMALL}),
    "Gemma 3, pan and scan": (
        "gemma3",
        "Gemma3",
        {"size": SMALL, "do_pan_and_scan": True} | {f"pan_and_scan_{key}": value for key, value in SCAN.items()},
    ),
}
SIZES = [(48, 48), (40, 71), (97, 50)]


def processor(case: str) -> Any:
    module, name, settings = CASES[case]
    home = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(home, f"{name}ImageProcessorPil")(**settings)


def random_images(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Two hard ones: noise, and black and white blocks that make sharp filters overshoot."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 2, (height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))
    noise = rng.integers(0, 256, (height, width, 3))
    return np.stack([noise, 255 * blocks[:height, :width]]).astype(np.uint8)


def as_tensor(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_exact_pixels_equal_the_processors(case: str, size: tuple[int, int]) -> None:
    reader, pixels = processor(case), random_images(*size)
    alone = [reader(images=[image], return_tensors="pt")["pixel_values"] for image in pixels]
    ours = pixel_values(reader, as_tensor(pixels), exact=True)
    assert ours.shape == torch.cat(alone).shape
    assert torch.allclose(ours, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_smooth_pixels_stay_within_the_processors_rounding(case: str) -> None:
    # Each resize rounds twice to whole levels, by half a level each: at most two in a row here, so two levels in all,
    # of 1 / 255 / 0.226 normalized at most. Overshoot can amplify the first rounding a little.
    reader, pixels = processor(case), random_images(40, 71)
    exact, smooth = (pixel_values(reader, as_tensor(pixels), exact=exact) for exact in (True, False))
    level = 1 / 255 / min(reader.image_std)
    assert float((exact - smooth).abs().max()) < 2.5 * level
    assert float((exact - smooth).abs().mean()) < 0.5 * level


def test_without_resampling_smooth_is_exact() -> None:
    reader = import_module("transformers.models.siglip.image_processing_pil_siglip").SiglipImageProcessorPil(size=SMALL)
    pixels = random_images(56, 56)
    expected = reader(images=list(pixels), return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixel_values(reader, as_tensor(pixels)), expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_mixed_precision_does_not_reach_the_pixels(case: str) -> None:
    reader, pixels = processor(case), as_tensor(random_images(40, 71))
    with torch.autocast("cpu", torch.bfloat16):  # in which trainings guide
        mixed = [pixel_values(reader, pixels, exact=exact) for exact in (False, True)]
    assert torch.equal(mixed[0], pixel_values(reader, pixels))
    assert torch.equal(mixed[1], pixel_values(reader, pixels, exact=True))


@pytest.mark.parametrize("case", CASES)
def test_every_pixel_that_is_read_has_the_right_gradient(case: str) -> None:
    reader, rng = processor(case), torch.Generator().manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(1, 3, 40, 71, generator=rng)  # away from black and white, where clipping bends
    x = images.clone().requires_grad_()
    out = pixel_values(reader, x)
    weight, step = torch.randn(out.shape, generator=rng), torch.randn(images.shape, generator=rng)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    moved = [(pixel_values(reader, images + s * 1e-2 * step) * weight).double().sum() for s in (1, -1)]
    assert float((grad * step).sum()) == pytest.approx(float(moved[0] - moved[1]) / 2e-2, rel=2e-2, abs=0.5)
    exact = pixel_values(reader, x, exact=True)
    assert torch.allclose(torch.autograd.grad((exact * weight).sum(), x)[0], grad, atol=1e-3)  # through the rounding


def test_resampling_equals_pillow_for_every_filter() -> None:
    from transformers.image_transforms import resize
    from transformers.image_utils import ChannelDimension, PILImageResampling

    rng, ops, way = np.random.default_rng(1), Levels(exact=True), ChannelDimension.FIRST
    for filter_ in FILTERS:
        for _ in range(8):
            tall, wide, height, width = (int(side) for side in rng.integers(12, 60, 4))
            pixels = rng.integers(0, 256, (3, tall, wide), dtype=np.uint8)
            expected_levels = resize(
                pixels, (height, width), resample=PILImageResampling(filter_), data_format=way, input_data_format=way
            )
            ours = ops.resize(torch.from_numpy(pixels)[None].double(), height, width, filter_)[0]
            assert np.array_equal(ours.numpy(), expected_levels), (filter_, tall, wide, height, width)


def test_an_unknown_processor_is_an_error_with_its_name() -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    with pytest.raises(CodefendError, match=r"PixtralImageProcessor.*Qwen2VLImageProcessor"):
        pixel_values(PixtralImageProcessorPil(), torch.rand(1, 3, 32, 32))
    with pytest.raises(CodefendError, match="filter 0"):
        Levels(exact=False).resize(torch.zeros(1, 3, 8, 8), 4, 4, 0)
    assert set(FAMILIES) <= {f"{name}ImageProcessor" for _, name, _ in CASES.values()}
