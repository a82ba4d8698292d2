"""Animated images: the frames of a GIF, WebP or PNG as they are shown, one at a time, and animated WebP files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from codefend.core.images import LoadedImage, decoding, from_pil, open_header
from codefend.types import CodefendError

KINDS = ("GIF", "WEBP", "PNG")
MAX_FRAMES = 32
_NAME = "the image"
_MAX_MS, _MAX_LOOPS = (1 << 24) - 1, (1 << 16) - 1  # that a WebP file can say


class Animation:
    """An animated image whose header was read: ``count`` frames, played ``loop`` times (0: for ever).

    A still image in front of a PNG's animation, which only viewers of still images show, is left out. Raises
    CodefendError for over `MAX_FRAMES` frames, for over ``max_pixels`` in all of them, and for damaged files.
    """

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        with decoding(_NAME, max_pixels):
            self._image, header = open_header(io.BytesIO(data), _NAME)
            self._start = int(bool(self._image.info.get("default_image")))
            self.count = int(getattr(self._image, "n_frames", 1)) - self._start
            self.loop = min(int(self._image.info.get("loop", 1)), _MAX_LOOPS)
            self._size = header.width, header.height
        if self.count > MAX_FRAMES:
            raise CodefendError(f"{_NAME} has {self.count} frames; the limit is {MAX_FRAMES}")
        pixels = header.width * header.height * self.count
        if pixels > max_pixels:
            raise CodefendError(f"{_NAME} has {pixels:,} pixels in {self.count} frames; the limit is {max_pixels:,}")

    def frames(self, *, max_side: int = 0) -> Iterator[tuple[LoadedImage, int]]:
        """Each frame and its milliseconds; ``max_side`` as in `images.load`. Raises CodefendError."""
        for place in range(self._start, self._start + self.count):
            with decoding(_NAME, self._max_pixels):
                self._image.seek(place)
                self._image.load()
                if self._image.size != self._size:
                    raise CodefendError(f"{_NAME} has frames of different sizes")
                duration = min(round(self._image.info.get("duration", 0)), _MAX_MS)
            yield from_pil(self._image, max_side=max_side), duration


def levels(pixels: Tensor) -> Tensor:
    """Pixels in ``[0, 1]`` as the 256 levels of a file, in bytes: a quarter of the memory."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def encode(frames: Sequence[Tensor], durations: Sequence[int], loop: int, *, quality: int | None = None) -> bytes:
    """Encode frames ``[3, H, W]`` of `levels` as an animated WebP, lossless when ``quality`` is None.

    Frames that equal the one before are joined to it. Raises CodefendError when the format cannot hold the size.
    """
    first, *others = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames]
    options = {"lossless": True} if quality is None else {"quality": quality}
    buffer = io.BytesIO()
    try:
        first.save(buffer, "WEBP", save_all=True, append_images=others, duration=list(durations), loop=loop, **options)
    except (OSError, RuntimeError, ValueError) as error:  # WebP allows 16,383 pixels a side
        raise CodefendError(f"an animation of {first.width}x{first.height} cannot be written ({error})") from error
    return buffer.getvalue()
