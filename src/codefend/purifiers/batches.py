"""Purify the image column of a batch: for ``map`` of datasets, and for ``map_batches`` of Ray Data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codefend.core import images
from codefend.purifiers import load
from codefend.purifiers.base import Purifier
from codefend.purifiers.image_files import FolderOptions, noise_seed_of, purify_files, purify_group
from codefend.types import CodefendError


class BatchPurifier:
    """Loads a purifier once; a call maps a batch to the same batch with purified images.

    Images are files (bytes, or ``{"bytes", "path"}`` as datasets stores them), PIL images, or uint8 arrays
    ``[H, W, 3]``, and keep their type. They are the same bytes and pixels as `codefend purify` writes: noise depends on
    the image and ``seed`` alone. A file that cannot be read becomes None; ``failures`` counts them.

    >>> import numpy as np
    >>> from codefend.purifiers.batches import BatchPurifier
    >>> purify = BatchPurifier("jpeg")
    >>> batch = purify({"image": [np.zeros((8, 8, 3), np.uint8)], "label": [1]})
    >>> batch["image"][0].shape, batch["label"]
    ((8, 8, 3), [1])
    """

    def __init__(
        self, purifier: str | Purifier = "bridge", *, column: str = "image", seed: int = 0, **options: Any
    ) -> None:
        """``options`` are further fields of `FolderOptions`, such as ``max_side`` and ``quality``, for files."""
        self.purifier = load(purifier) if isinstance(purifier, str) else purifier
        self.options = FolderOptions(purifier=self.purifier.name, seed=seed, **options)
        self.column, self.failures = column, 0

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Purify one batch. Raises CodefendError for a missing column and for values that are not images."""
        if self.column not in batch:
            raise CodefendError(f"the batch has no column {self.column!r}; it has {', '.join(batch)}")
        values = batch[self.column]
        purified = [None if value is None else self._purified(value) for value in values]
        if not isinstance(values, np.ndarray):
            return {**batch, self.column: purified}
        return {**batch, self.column: _stacked(purified, whole=values.dtype != object)}

    def _purified(self, value: Any) -> Any:
        if isinstance(value, bytes):
            return self._file("image", value)
        if isinstance(value, Mapping):
            data, path = value["bytes"], value.get("path")
            result = None if data is None else self._file(path or "image", data)
            return None if result is None else {**value, "bytes": result}
        if images.is_pil(value):
            loaded = images.from_pil(value)
            return images.to_pil(loaded.recombine(self._pixels(loaded)))
        if isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3 and value.dtype == np.uint8:
            pixels = torch.from_numpy(value.astype(np.float32) / 255).permute(2, 0, 1).contiguous()
            return _levels(self._pixels(images.LoadedImage(pixels)))
        kind = f"array {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise CodefendError(f"column {self.column!r} holds {kind}; expected image files, PIL images or uint8 [H, W, 3]")

    def _file(self, name: str, data: bytes) -> bytes | None:
        (result,) = purify_files(self.purifier, [(name, data)], self.options)
        self.failures += bool(result.error)
        return None if result.error else result.data

    def _pixels(self, loaded: images.LoadedImage) -> Tensor:
        noise = noise_seed_of(self.purifier, loaded, self.options.seed)
        return purify_group(self.purifier, [loaded], [noise])[0]


def _levels(pixels: Tensor) -> np.ndarray[Any, Any]:
    levels: np.ndarray[Any, Any] = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return levels


def _stacked(values: Sequence[Any], *, whole: bool) -> np.ndarray[Any, Any]:
    """One array for images of one size, else an array of objects."""
    if whole:
        return np.stack(values)
    stacked = np.empty(len(values), dtype=object)
    stacked[:] = values
    return stacked
