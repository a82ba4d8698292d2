"""Sensor noise and JPEG artefacts, which most photographs have.

A network trained on rendered or clean images alone mistakes them for an attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core import images

Augmentation = Callable[[Tensor, np.random.Generator], Tensor]  # of one image [3, H, W]
QUALITIES = 50, 99  # of JPEG, uniform; most photographs on the web have 75 to 95
SUBSAMPLINGS = 3  # of its chroma, in Pillow's numbers: 4:4:4, 4:2:2, 4:2:0
BLOCK = 16  # pixels, of JPEG's grid where the chroma is halved
MAX_NOISE = 2.5 / 255  # standard deviation at mid-grey


def jpeg_file(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` after JPEG compression of random quality and chroma subsampling, at a random offset of its grid."""
    top, left = (int(rng.integers(BLOCK)) for _ in range(2))
    padded = F.pad(image[None], (left, BLOCK - left, top, BLOCK - top), mode="replicate")[0]
    quality, subsampling = int(rng.integers(*QUALITIES)), int(rng.integers(SUBSAMPLINGS))
    decoded = images.load(images.encode(padded, "JPEG", quality=quality, subsampling=subsampling)).pixels
    return decoded[:, top : top + image.shape[1], left : left + image.shape[2]]


def sensor_noise(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` with noise whose variance grows with the signal (Foi et al. 2008), from none to MAX_NOISE.

    Coarser or finer than the pixels, as after demosaicing and resizing; half of the time the same in all channels.
    """
    height, width = image.shape[1:]
    scale = float(rng.uniform(0.6, 1.6))  # of the grid on which it is drawn
    grid = max(1, round(height * scale)), max(1, round(width * scale))
    channels = 1 if rng.random() < 0.5 else 3
    coarse = torch.from_numpy(rng.standard_normal((1, channels, *grid))).to(image.dtype)
    noise = F.interpolate(coarse, (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    noise = noise / noise.square().mean().sqrt().clamp_min(1e-6)
    shot = float(rng.random())  # share of shot noise in the variance
    level = float(rng.uniform(0, MAX_NOISE)) * (1 - shot + 2 * shot * image.mean(0)).sqrt()
    return (image + level * noise).clamp(0, 1)


def noisy_file(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` with `sensor_noise`, in three of four cases after JPEG compression (`jpeg_file`)."""
    noisy = sensor_noise(image, rng)
    return jpeg_file(noisy, rng) if rng.random() < 0.75 else noisy


def unchanged(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``[3, H, W]`` itself."""
    return image


AUGMENTATIONS = unchanged, jpeg_file, noisy_file


def augment_camera(
    batch: Tensor, rng: np.random.Generator, augmentations: Sequence[Augmentation] = AUGMENTATIONS
) -> Tensor:
    """Images ``[B, 3, H, W]`` with one of the ``augmentations`` each, in 8 bits."""
    augmented = [augmentations[int(rng.integers(len(augmentations)))](image, rng) for image in batch]
    return images.quantize8(torch.stack(augmented))
