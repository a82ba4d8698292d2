"""Purify with a model that `codefend export` wrote: numpy and onnxruntime, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codefend.core.assets import needs
from codefend.purifiers import grid
from codefend.types import CodefendError

if TYPE_CHECKING:
    import numpy as np

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class OnnxPurifier:
    """``pixels [H, W, 3]`` of 8 bits in, the same out; large images in tiles, as in `codefend.purifiers.base`."""

    def __init__(self, path: str | Path, *, providers: tuple[str, ...] = ("CPUExecutionProvider",)) -> None:
        """Raises CodefendError when onnxruntime is missing or the file is not an exported purifier."""
        with needs("this", "onnx"):
            import onnxruntime
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=list(providers))
            settings = json.loads(self._session.get_modelmeta().custom_metadata_map["codefend"])
        except Exception as error:  # onnxruntime raises its own kinds
            raise CodefendError(
                f"{path} is not a model that `codefend export` wrote: {str(error).splitlines()[0]}"
            ) from error
        self.name: str = settings["name"]
        self.multiple: int = settings["multiple"]

    def __call__(self, pixels: Pixels) -> Pixels:
        """Purify one image. Raises ValueError on another shape or dtype."""
        import numpy as np

        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or pixels.size == 0:
            raise ValueError(f"expected 8-bit pixels [H,W,3], got {pixels.dtype} {pixels.shape}")
        height, width = pixels.shape[:2]
        images = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255
        for axis in (2, 3):
            side = images.shape[axis]
            gap = -side % self.multiple
            around = [(0, gap if i == axis else 0) for i in range(4)]
            images = np.pad(images, around, mode="reflect" if gap < side else "edge")
        whole = height * width <= grid.TILED_ABOVE
        purified = (self._run(images) if whole else self._tiles(images))[0, :, :height, :width]
        levels: Pixels = (purified.transpose(1, 2, 0).clip(0, 1) * 255 + 0.5).astype(np.uint8)
        return levels

    def _run(self, images: Any) -> Any:
        return self._session.run(None, {"images": images})[0]

    def _tiles(self, images: Any) -> Any:
        import numpy as np

        height, width = images.shape[-2:]
        total, weights = np.zeros_like(images), np.zeros_like(images[:, :1])
        for top, bottom, left, right in grid.boxes(height, width):
            rows, columns = grid.ramp(top, bottom, height), grid.ramp(left, right, width)
            weight = np.outer(rows, columns).astype(np.float32)
            part = self._run(np.ascontiguousarray(images[..., top:bottom, left:right]))
            total[..., top:bottom, left:right] += part * weight
            weights[..., top:bottom, left:right] += weight
        return total / weights
