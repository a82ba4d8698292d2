"""Where the tiles of a large picture lie, and how much each counts where they overlap. Needs neither torch nor numpy.

A tile's outermost ``MARGIN`` pixels are context only: convolutions near a cut see padding where the picture goes on.
Between the margins of two neighbours the weights change linearly, so a difference that is left becomes a slope, not an
edge. The networks here see 160 to 300 pixels around, but little of that far off: measured on photographs, tiled and
whole differ by 0.2 of a level of 255 at most, with noise of 8/255 by 1.2 at most and 0.2 at the 99.9th percentile (one
evaluation; benchmarks/large_image.py). Guidance, by encoders that see further, differs by 2.4 and 0.9.
"""

from __future__ import annotations

from collections.abc import Iterator

TILED_ABOVE = 2_000_000  # pixels of one picture
TILE = 1024  # side of a tile, pixels; a multiple of every network's multiple
OVERLAP = 128  # pixels that neighbouring tiles share
MARGIN = 32  # outermost pixels of a tile, seen as context but not used

Box = tuple[int, int, int, int]  # top, bottom, left, right


def boxes(height: int, width: int) -> Iterator[Box]:
    """The tiles of a picture whose sides are multiples of the network's multiple, each on the network's grid."""
    for top, bottom in _spans(height):
        for left, right in _spans(width):
            yield top, bottom, left, right


def ramp(start: int, stop: int, side: int) -> list[float]:
    """The weight of each row (or column) of a tile that reaches from ``start`` to ``stop`` of ``side``."""
    full = OVERLAP - 2 * MARGIN
    before = [full if start == 0 else place - MARGIN for place in range(stop - start)]
    after = [full if stop == side else stop - start - 1 - place - MARGIN for place in range(stop - start)]
    return [float(min(max(min(pair), 0), full)) for pair in zip(before, after, strict=True)]


def _spans(side: int) -> Iterator[tuple[int, int]]:
    # The last tile ends with the picture, and so starts on the network's grid: both sides are multiples.
    for start in range(0, max(side - OVERLAP, 1), TILE - OVERLAP):
        first = min(start, max(side - TILE, 0))
        yield first, min(first + TILE, side)
