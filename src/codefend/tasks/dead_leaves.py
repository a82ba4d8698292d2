"""Procedural natural images: "dead leaves" with the colours and textures of photographs.

Shapes of power-law size occlude each other in random order (Lee, Mumford & Huang 2001); the canvas is then blurred and
downsampled, as by a lens and a sensor. Networks trained on such images restore natural ones nearly as well as those
trained on photographs (Achddou, Gousseau & Ladjal 2021, "Synthetic images as a regularity prior for image restoration
neural networks"; 2023, "Fully synthetic training for image restoration tasks").

`training_images.dead_leaves` is a smaller and cheaper variant, which the shipped weights were trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.core.checkpoints import cached_tensors
from codefend.core.progress import progress
from codefend.tasks.training_images import training_photographs

SIDE = 384  # pixels of a finished canvas
OVERSAMPLING = 2  # a canvas is drawn at this multiple of its size
RADII = (4.0, 300.0)  # pixels of the drawing
EXPONENT = 2.4  # density of the radii ~ r^-EXPONENT; 3 is scale invariant, but needs ten times the leaves to cover
LEAVES = 1500
PALETTE = 512  # colours drawn from each photograph


def draw_canvas(rng: np.random.Generator, photographs: Sequence[Tensor] | None = None) -> Tensor:
    """One canvas ``[3, SIDE, SIDE]`` in [0, 1].

    ``photographs`` ``[3, H, W]`` give colours and textures; by default those of `training_photographs`.
    """
    photographs = training_photographs() if photographs is None else photographs
    side = SIDE * OVERSAMPLING
    sources = [photographs[int(rng.integers(len(photographs)))].numpy() for _ in range(2)]
    palette = np.concatenate([_colours(rng, source, PALETTE) for source in sources])
    if rng.random() < 0.25:  # colours that no photograph has
        palette = rng.uniform(0, 1, palette.shape).astype(np.float32)
    image = np.broadcast_to(palette[0][:, None, None], (3, side, side)).copy()
    low, high = RADII
    low *= float(rng.uniform(1, 3))
    power = 1 - EXPONENT
    radii = rng.uniform(high**power, low**power, LEAVES) ** (1 / power)
    for radius in radii:
        _paint_leaf(rng, image, float(radius), palette, sources)
    return _develop(rng, torch.from_numpy(image))


def load_canvases(path: str | Path, count: int, *, seed: int = 0) -> Tensor:
    """``count`` canvases in 8 bits ``[count, 3, SIDE, SIDE]``, read from ``path``, or drawn and written there.

    A file with another count or seed is drawn anew. About half a second of one core and 0.4 MB per canvas. Raises
    CodefendError when the packages with the photographs are missing or the file cannot be written.
    """
    state = {"count": count, "seed": seed, "side": SIDE}
    return cached_tensors(path, state, lambda: {"canvases": _draw_canvases(count, seed)})["canvases"]


def _draw_canvases(count: int, seed: int) -> Tensor:
    images = []
    with progress("dead leaves", count) as advance:
        for index in range(count):
            image = draw_canvas(np.random.default_rng([seed, 17, index]))
            images.append((image * 255).round().to(torch.uint8))
            advance(1)
    return torch.stack(images)


def _colours(rng: np.random.Generator, photograph: np.ndarray, count: int) -> np.ndarray:
    flat = photograph.reshape(3, -1)
    return np.ascontiguousarray(flat[:, rng.integers(flat.shape[1], size=count)].T)


def _paint_leaf(
    rng: np.random.Generator, image: np.ndarray, radius: float, palette: np.ndarray, sources: Sequence[np.ndarray]
) -> None:
    """Draw one leaf over the image, in place."""
    side = image.shape[-1]
    cy, cx = rng.uniform(-radius / 2, side + radius / 2, 2)
    top, bottom = max(0, int(cy - radius)), min(side, int(cy + radius) + 1)
    left, right = max(0, int(cx - radius)), min(side, int(cx + radius) + 1)
    if bottom <= top or right <= left:
        return
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(cy)
    dx = np.arange(left, right, dtype=np.float32)[None] - np.float32(cx)
    inside = _shape(rng, dy, dx, radius)
    leaf = _texture(rng, dy, dx, radius, palette, sources)
    np.copyto(image[:, top:bottom, left:right], leaf, where=inside[None])


def _shape(rng: np.random.Generator, dy: np.ndarray, dx: np.ndarray, radius: float) -> np.ndarray:
    """Mask ``[h, w]`` of the pixels inside the leaf: a disc, an ellipse, a box or a blob."""
    kind, angle = rng.random(), rng.uniform(0, np.pi)
    if kind < 0.25:
        disc: np.ndarray = dx * dx + dy * dy < radius * radius
        return disc
    u = dx * np.float32(np.cos(angle)) + dy * np.float32(np.sin(angle))
    v = dy * np.float32(np.cos(angle)) - dx * np.float32(np.sin(angle))
    ratio = rng.uniform(0.15, 0.9)
    if kind < 0.5:
        return np.asarray(u * u + (v / ratio) ** 2 < radius * radius)
    if kind < 0.8:
        return np.asarray((np.abs(u) < radius * 0.7) & (np.abs(v) < radius * ratio * 0.7))
    theta, edge = np.arctan2(dy, dx), np.float32(0.7)
    waves = rng.integers(2, 9, 3)
    for wave in waves:
        edge = edge + np.float32(rng.uniform(0, 0.12)) * np.cos(wave * theta + np.float32(rng.uniform(0, 6.3)))
    return np.asarray(dx * dx + dy * dy < (radius * edge) ** 2)


def _texture(
    rng: np.random.Generator,
    dy: np.ndarray,
    dx: np.ndarray,
    radius: float,
    palette: np.ndarray,
    sources: Sequence[np.ndarray],
) -> np.ndarray:
    """``[3, h, w]``: a colour, flat or shaded, with stripes, grain or the texture of a photograph."""
    colour = palette[int(rng.integers(len(palette)))][:, None, None]
    kind = rng.random()
    if kind < 0.3:
        return np.broadcast_to(colour, (3, dy.shape[0], dx.shape[1]))
    slope = rng.normal(0, 0.2, 2).astype(np.float32) / np.float32(radius)
    leaf = colour + slope[0] * dy + slope[1] * dx
    if kind < 0.5:
        return np.asarray(leaf)
    strength = np.float32(rng.uniform(0.02, 0.25))
    if kind < 0.62:
        angle, period = rng.uniform(0, np.pi), np.float32(rng.uniform(3, 40))
        phase = dx * np.float32(np.cos(angle)) + dy * np.float32(np.sin(angle))
        return np.asarray(leaf + strength * np.sin(np.float32(2 * np.pi) / period * phase))
    if kind < 0.7:
        grain = rng.standard_normal((dy.shape[0], dx.shape[1]), dtype=np.float32)
        return np.asarray(leaf + np.float32(0.4) * strength * grain)
    patch = _patch(rng, sources[int(rng.integers(len(sources)))], dy.shape[0], dx.shape[1])
    if kind < 0.85:
        return patch
    return np.asarray(leaf + 4 * strength * (patch - patch.mean((1, 2), keepdims=True)))


def _patch(rng: np.random.Generator, source: np.ndarray, height: int, width: int) -> np.ndarray:
    """A window of the photograph at a random stride, mirrored beyond its edges, ``[3, height, width]``."""
    stride = int(rng.integers(1, 4))
    rows = _mirror(int(rng.integers(source.shape[1])) + stride * np.arange(height), source.shape[1])
    columns = _mirror(int(rng.integers(source.shape[2])) + stride * np.arange(width), source.shape[2])
    patch: np.ndarray = source[:, rows[:, None], columns[None]]
    return patch


def _mirror(indices: np.ndarray, size: int) -> np.ndarray:
    """Indices from 0 on, reflected into ``[0, size)``."""
    remainder = indices % (2 * size)
    return np.asarray(np.minimum(remainder, 2 * size - 1 - remainder))


def _develop(rng: np.random.Generator, image: Tensor) -> Tensor:
    """Lens blur, downsampling and a tone curve, ``[3, SIDE, SIDE]``."""
    image = image[None]
    blur = float(rng.uniform(0.0, 1.6))
    if blur > 0.4:
        reach = torch.arange(-4, 5, dtype=torch.float32)
        kernel = (-(reach**2) / (2 * blur**2)).exp()
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, 9)
        image = F.conv2d(F.pad(image, (4, 4, 0, 0), mode="reflect"), kernel, groups=3)
        image = F.conv2d(F.pad(image, (0, 0, 4, 4), mode="reflect"), kernel.transpose(2, 3), groups=3)
    image = F.avg_pool2d(image, OVERSAMPLING)[0].clamp(0, 1)
    return image ** float(rng.uniform(0.7, 1.4))
