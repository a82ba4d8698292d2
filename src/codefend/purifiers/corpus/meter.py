"""Progress of a corpus: kilobytes of the source, images per second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from codefend.core.progress import progress


class Meter:
    """Adds up what units report while they are worked on, and what is left of them when they are finished."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self._advance, self._start = advance, time.monotonic()
        self._images = self._bytes = self._shown = 0
        self._unit = (0, 0)  # images and bytes of the current unit that were added already

    def tick(self, images: int, size: int) -> None:
        """Images and bytes of the current unit."""
        self._unit = (self._unit[0] + images, self._unit[1] + size)
        self._add(images, size)

    def finish(self, images: int, size: int) -> None:
        """A whole unit."""
        counted, self._unit = self._unit, (0, 0)
        self._add(images - counted[0], size - counted[1])

    def _add(self, images: int, size: int) -> None:
        self._images += images
        self._bytes += size
        rate = self._images / max(time.monotonic() - self._start, 1e-3)
        kilobytes = self._bytes // 1000
        self._advance(kilobytes - self._shown, f"{self._images:,} images, {rate:.1f} images/s")
        self._shown = kilobytes


@contextmanager
def metered(size: int) -> Iterator[Meter]:
    """Show progress over ``size`` bytes of the source."""
    with progress("purify (kB)", max(1, size // 1000)) as advance:
        yield Meter(advance)
