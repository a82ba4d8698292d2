"""Clean training images for the purifiers: composed scenes, photographs and procedural "dead leaves".

Dead leaves (Lee, Mumford & Huang 2001; for training restorers: Achddou et al. 2021) have the scale statistics and edges
of natural images and no licence. They supplement the few free photographs that packages carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core import images
from codefend.core.assets import needs
from codefend.tasks.scenes import SIZE, compose, load_photographs
from codefend.types import CodefendError

# Photographs of scikit-image that are reserved for evaluation and never trained on: all CC0 or public domain.
HELD_OUT = ("astronaut", "chelsea", "coffee", "rocket")
SHARES = (0.5, 0.2, 0.3)  # scenes, photographs, dead leaves
OWN_SHARES = (0.35, 0.5, 0.15)  # the same where the user has photographs of their own
OWN_SIDE = 1024  # their shorter side at most, in pixels: full-size crops of large photographs are mostly blur


@cache
def training_photographs() -> tuple[Tensor, ...]:
    """Images ``[3, H, W]``: scikit-image's (public domain, CC0) and scikit-learn's two photographs (CC-BY).

    Raises CodefendError when either package is missing.
    """
    with needs("training", "train"):
        from sklearn.datasets import load_sample_images
    colour = [torch.from_numpy(i.copy()).permute(2, 0, 1).float().div(255) for i in load_sample_images().images]
    return (*load_photographs(), *colour, *colour)  # the two natural ones twice: most of the others are textures


@cache
def own_photographs(folder: str) -> tuple[Tensor, ...]:
    """The user's photographs ``[3, H, W]`` in [0, 1] of a folder and the folders in it, by name; "": none.

    Raises CodefendError when the folder holds no images, or one that cannot be read or is under 128 pixels a side.
    """
    if not folder:
        return ()
    return tuple(_at_most(images.load(path, first_frame=True).pixels, path) for path in own_paths(folder))


def own_paths(folder: str) -> list[Path]:
    """The files of `own_photographs`, in its order. Raises CodefendError when there is none."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in images.READABLE and p.name[0] != ".")
    if not paths:
        raise CodefendError(f"{folder} holds no images; looked for {' '.join(sorted(images.READABLE))}")
    return paths


def _at_most(pixels: Tensor, path: Path) -> Tensor:
    """The image, downscaled to a shorter side of OWN_SIDE if that is longer."""
    height, width = pixels.shape[1:]
    if min(height, width) < SIZE:
        raise CodefendError(f"{path} is {width} x {height} pixels; photographs to train on need {SIZE} or more a side")
    if (factor := OWN_SIDE / min(height, width)) >= 1:
        return pixels
    size = round(height * factor), round(width * factor)
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def draw_training_images(
    rng: np.random.Generator,
    count: int,
    *,
    first_scene: int,
    own: Sequence[Tensor] = (),
    shares: Sequence[float] = (),
) -> Tensor:
    """``[count, 3, 128, 128]`` in [0, 1]. Scenes are numbered from ``first_scene`` of "train".

    Mixed by ``shares``; by default SHARES, or OWN_SHARES with the user's ``own`` photographs, which are then three
    photographs of four.
    """
    drawn = []
    for i in range(count):
        kind = rng.choice(3, p=shares or (OWN_SHARES if own else SHARES))
        if kind == 0:
            drawn.append(compose("train", first_scene + i, photographs=load_photographs()).image)
        elif kind == 1 and own and rng.random() < 0.75:
            drawn.append(_own_crop(rng, own))
        elif kind == 1:
            drawn.append(_crop(rng, training_photographs()))
        else:
            drawn.append(dead_leaves(rng))
    return torch.stack(drawn)


def _crop(rng: np.random.Generator, photographs: Sequence[Tensor]) -> Tensor:
    """A random crop at a random scale, flipped and rotated, with a little colour jitter."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    side = int(rng.integers(SIZE, max(SIZE + 1, min(3 * SIZE, *photograph.shape[1:]))))
    return _view(rng, photograph, side)


def _own_crop(rng: np.random.Generator, photographs: Sequence[Tensor]) -> Tensor:
    """As `_crop`, at scales from the photograph's own to the whole image, evenly in their logarithm."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    return _view(rng, photograph, int(SIZE * (min(photograph.shape[1:]) / SIZE) ** rng.random()))


def _view(rng: np.random.Generator, photograph: Tensor, side: int) -> Tensor:
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
    # Radii from a density ~ r^-3 between 3 and 60 pixels make the image scale invariant; large leaves first.
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
        alpha = np.clip(inside + 0.5, 0, 1)  # antialiased over one pixel
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
