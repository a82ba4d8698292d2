"""Clean training pictures for the purifiers: composed scenes, photographs, and drawn "dead leaves".

Dead leaves (Lee, Mumford & Huang 2001; for training restorers: Achddou et al. 2021) have the scale statistics and edges
of natural images and no licence: they make up for the few free photographs that packages carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.tasks.scenes import SIZE, compose, load_photographs
from codefend.types import UserError

# Photographs of scikit-image kept for evaluation, never trained on: all CC0 or public domain.
HELD_OUT = ("astronaut", "chelsea", "coffee", "rocket")
SHARES = (0.5, 0.2, 0.3)  # scenes, photographs, dead leaves


@cache
def training_photographs() -> tuple[Tensor, ...]:
    """Pictures ``[3, H, W]``: scikit-image's (public domain, CC0) and scikit-learn's two photographs (CC-BY).

    Raises UserError when either package is missing.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise UserError("training purifiers needs scikit-learn's photographs: pip install 'codefend[train]'") from error
    colour = [torch.from_numpy(i.copy()).permute(2, 0, 1).float().div(255) for i in load_sample_images().images]
    return (*load_photographs(), *colour, *colour)  # the two natural ones twice: most of the others are textures


def training_pictures(rng: np.random.Generator, count: int, *, first_scene: int) -> Tensor:
    """``[count, 3, 128, 128]`` in [0, 1], mixed by SHARES. Scenes are numbered from ``first_scene`` of "train"."""
    pictures = []
    for i in range(count):
        kind = rng.choice(3, p=SHARES)
        if kind == 0:
            pictures.append(compose("train", first_scene + i, photographs=load_photographs()).image)
        elif kind == 1:
            pictures.append(_crop(rng, training_photographs()))
        else:
            pictures.append(dead_leaves(rng))
    return torch.stack(pictures)


def _crop(rng: np.random.Generator, photographs: Sequence[Tensor]) -> Tensor:
    """A random crop at a random scale, mirrored and turned, with its contrast and colours moved a little."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    side = int(rng.integers(SIZE, max(SIZE + 1, min(3 * SIZE, *photograph.shape[1:]))))
    top = int(rng.integers(photograph.shape[1] - side + 1))
    left = int(rng.integers(photograph.shape[2] - side + 1))
    crop = photograph[None, :, top : top + side, left : left + side]
    crop = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]
    crop = torch.rot90(crop, int(rng.integers(4)), (1, 2))
    if rng.random() < 0.5:
        crop = crop.flip(-1)
    gain = torch.tensor(rng.uniform(0.7, 1.2, (3, 1, 1)), dtype=torch.float32)
    return ((crop - 0.5) * gain + 0.5 + float(rng.uniform(-0.1, 0.1))).clamp(0, 1)


def dead_leaves(rng: np.random.Generator, *, leaves: int = 120) -> Tensor:
    """Overlapping discs and boxes with power-law sizes, each flat, shaded or textured, ``[3, 128, 128]``."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    image = np.broadcast_to(rng.uniform(0, 1, (3, 1, 1)).astype(np.float32), (3, SIZE, SIZE)).copy()
    palette = _palette(rng)
    # Radii from a density ~ r^-3 between 3 and 60 pixels make the picture scale invariant; large leaves first.
    radii = np.sort((rng.uniform(1 / 60**2, 1 / 3**2, leaves)) ** -0.5)[::-1]
    for radius in radii:
        cy, cx = rng.uniform(0, SIZE, 2)
        low_y, high_y = max(0, int(cy - radius)), min(SIZE, int(cy + radius) + 2)
        low_x, high_x = max(0, int(cx - radius)), min(SIZE, int(cx + radius) + 2)
        dy, dx = y[low_y:high_y, low_x:high_x] - cy, x[low_y:high_y, low_x:high_x] - cx
        if rng.random() < 0.6:
            inside = radius - np.hypot(dy, dx)
        else:
            angle = rng.uniform(0, np.pi)
            u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
            inside = np.minimum(radius * 0.7 - np.abs(u), radius * rng.uniform(0.2, 0.7) - np.abs(v))
        alpha = np.clip(inside + 0.5, 0, 1)  # soft over one pixel, as a lens draws it
        colour = np.clip(palette[rng.integers(6)] + rng.normal(0, 0.08, 3), 0, 1)[:, None, None]
        slope = rng.normal(0, 0.15, 2) / radius
        leaf = colour + slope[0] * dy + slope[1] * dx
        if rng.random() < 0.35:
            leaf = leaf + rng.uniform(0.02, 0.12) * _texture(rng, dy, dx)
        window = image[:, low_y:high_y, low_x:high_x]
        window += alpha * (leaf - window)
    return torch.from_numpy(image).float().clamp(0, 1)


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Six colours: half of the time of one photograph, which go together as in nature, else any."""
    if rng.random() < 0.5:
        return rng.uniform(0, 1, (6, 3))
    photographs = training_photographs()
    flat = photographs[int(rng.integers(len(photographs)))].flatten(1)
    colours: np.ndarray = flat[:, torch.from_numpy(rng.integers(flat.shape[1], size=6))].T.numpy()
    return colours


def _texture(rng: np.random.Generator, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """Stripes or grain of unit amplitude."""
    if rng.random() < 0.5:
        angle, period = rng.uniform(0, np.pi), rng.uniform(2.5, 12)
        stripes: np.ndarray = np.sin(2 * np.pi / period * (dx * np.cos(angle) + dy * np.sin(angle)))
        return stripes
    return rng.standard_normal(dy.shape)
