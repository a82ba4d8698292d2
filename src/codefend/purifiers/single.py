"""Purify one image of any kind: the function behind `codefend.purify`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codefend import purifiers
from codefend.core import images
from codefend.purifiers.base import Purifier
from codefend.types import CodefendError

_OVERSHOOT = 0.1  # beyond [0, 1], clamped by purifiers: resampling and rounding leave some


def purify(
    image: Any, purifier: str | Path | Purifier = "bridge", *, seed: int = 0, max_side: int | None = None
) -> Any:
    """Purify an image and return the same kind of object; a path returns a PIL image.

    ``image``: a path; a PIL image of any mode; an array ``[H, W, 3]``, uint8 or float in [0, 1]; a tensor
    ``[3, H, W]`` or ``[B, 3, H, W]``, float in [0, 1]. ``purifier``: a name or weights folder (loaded once), or a
    loaded purifier. ``seed`` fixes the purifier's noise. ``max_side`` first shrinks larger PIL images, in pixels.

    Raises CodefendError for an unreadable image, another kind of object, other values, and an unknown purifier.

    >>> import numpy as np, codefend
    >>> array = np.full((32, 48, 3), 128, dtype=np.uint8)
    >>> codefend.purify(array).shape
    (32, 48, 3)
    """
    loaded = purifier if isinstance(purifier, Purifier) else _load(str(purifier))
    if isinstance(image, str | Path):
        pixels = images.load(image)
        return loaded.purify(images.to_pil(pixels.recombine(pixels.pixels)), seed=seed, max_side=max_side)
    if isinstance(image, Tensor):
        return _purify_tensor(image, loaded, seed)
    if isinstance(image, np.ndarray):
        return _purify_array(image, loaded, seed)
    if not images.is_pil(image):
        raise CodefendError(f"cannot purify a {type(image).__name__}; pass a path, PIL image, array or tensor")
    return loaded.purify(image, seed=seed, max_side=max_side)


@lru_cache(maxsize=4)
def _load(name: str) -> Purifier:
    return purifiers.load(name)


def _purify_tensor(image: Tensor, purifier: Purifier, seed: int) -> Tensor:
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or not image.is_floating_point():
        raise CodefendError(
            f"expected a float tensor [3, H, W] or [B, 3, H, W] in [0, 1], got {image.dtype} {tuple(image.shape)}"
        )
    if not image.numel():
        raise CodefendError(f"the image is empty: {tuple(image.shape)}")
    low, high = (float(value) for value in image.detach().aminmax())
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):  # NaN fails it as well
        raise CodefendError(f"expected values in [0, 1], got {low:g} to {high:g}; scale 0-255, undo a normalization")
    batch = image if image.ndim == 4 else image[None]
    with torch.no_grad():
        purified = purifier(batch, generator=torch.Generator().manual_seed(seed))
    return purified if image.ndim == 4 else purified[0]


def _purify_array(image: np.ndarray[Any, Any], purifier: Purifier, seed: int) -> np.ndarray[Any, Any]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype.kind not in "uf" or image.dtype.itemsize > 8:
        raise CodefendError(f"expected an array [H, W, 3], uint8 or float in [0, 1], got {image.dtype} {image.shape}")
    if image.dtype.kind == "u" and image.dtype != np.uint8:
        raise CodefendError(f"expected uint8 or float in [0, 1], got {image.dtype}; scale it to 8 bits")
    top = 255 if image.dtype == np.uint8 else 1
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / top
    purified = _purify_tensor(pixels, purifier, seed).permute(1, 2, 0).numpy() * top
    return (purified.round() if top == 255 else purified).astype(image.dtype)
