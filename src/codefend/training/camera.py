"""What cameras and their files leave in a picture: noise of the sensor and traces of JPEG.

Photographs carry both; who has only met drawn or clean pictures takes them for an attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core import images

Way = Callable[[Tensor, np.random.Generator], Tensor]
QUALITIES = 50, 99  # of JPEG, even; most photographs on the web lie between 75 and 95
SUBSAMPLINGS = 3  # of its chroma, by Pillow's numbers: 4:4:4, 4:2:2, 4:2:0
BLOCK = 16  # pixels: of JPEG's grid where the chroma is halved
MOST_NOISE = 2.5 / 255  # standard deviation at mid-grey


def jpeg_file(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` as it comes out of a file of any usual quality and subsampling, cut out anywhere on its grid."""
    top, left = (int(rng.integers(BLOCK)) for _ in range(2))
    wider = F.pad(image[None], (left, BLOCK - left, top, BLOCK - top), mode="replicate")[0]
    quality, subsampling = int(rng.integers(*QUALITIES)), int(rng.integers(SUBSAMPLINGS))
    coded = images.load(images.encode(wider, "JPEG", quality=quality, subsampling=subsampling)).pixels
    return coded[:, top : top + image.shape[1], left : left + image.shape[2]]


def sensor_noise(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` with noise whose variance grows with the light (Foi et al. 2008), from none to MOST_NOISE.

    Coarser or finer than the pixels, as demosaicing and resizing leave it; half of the time the same in all colours.
    """
    height, width = image.shape[1:]
    scale = float(rng.uniform(0.6, 1.6))  # of the grid it was drawn on
    grid = max(1, round(height * scale)), max(1, round(width * scale))
    colours = 1 if rng.random() < 0.5 else 3
    drawn = torch.from_numpy(rng.standard_normal((1, colours, *grid))).to(image.dtype)
    noise = F.interpolate(drawn, (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    noise = noise / noise.square().mean().sqrt().clamp_min(1e-6)
    shot = float(rng.random())  # share of the variance that the light makes
    level = float(rng.uniform(0, MOST_NOISE)) * (1 - shot + 2 * shot * image.mean(0)).sqrt()
    return (image + level * noise).clamp(0, 1)


def noisy_file(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` with `sensor_noise`, three times of four in a file (`jpeg_file`)."""
    noisy = sensor_noise(image, rng)
    return jpeg_file(noisy, rng) if rng.random() < 0.75 else noisy


def untouched(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` as it is."""
    return image


WAYS = untouched, jpeg_file, noisy_file


def photographed(pictures: Tensor, rng: np.random.Generator, ways: Sequence[Way] = WAYS) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in 8 bits, each in one of the ``ways``."""
    return images.quantize8(torch.stack([ways[int(rng.integers(len(ways)))](picture, rng) for picture in pictures]))
