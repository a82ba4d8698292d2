"""The tiles of a large image and their weights where they overlap. Without torch and numpy, for `integrations.onnx`.

A tile's outermost ``MARGIN`` pixels are context only: at a cut, convolutions see padding instead of the image. Between
the margins of two neighbours the weights change linearly, so that a remaining difference is a slope and not an edge.
The networks' receptive fields are 160 to 300 pixels, with little weight far off: on photographs, tiled and whole
outputs differ by at most 0.2 8-bit levels; with noise of 8/255 by at most 1.2, and 0.2 at the 99.9th percentile (one
evaluation; benchmarks/large_image.py). Guidance, whose encoders have larger receptive fields, differs by 2.4 and 0.9.
"""

from __future__ import annotations

from collections.abc import Iterator

TILED_ABOVE = 2_000_000  # pixels of one image
TILE = 1024  # longest side of a tile, pixels; a multiple of every network's multiple
STEP = 64  # another: shorter sides of tiles are multiples of it
OVERLAP = 128  # pixels that neighbouring tiles share
MARGIN = 32  # outermost pixels of a tile: context, not used

Box = tuple[int, int, int, int]  # top, bottom, left, right


def boxes(height: int, width: int) -> Iterator[Box]:
    """The tiles of an image, each on the network's grid; the sides are multiples of the network's multiple."""
    for top, bottom in _spans(height):
        for left, right in _spans(width):
            yield top, bottom, left, right


def ramp(start: int, stop: int, side: int) -> list[float]:
    """The weight of each row (or column) of a tile from ``start`` to ``stop`` of ``side``."""
    full = OVERLAP - 2 * MARGIN
    before = [full if start == 0 else index - MARGIN for index in range(stop - start)]
    after = [full if stop == side else stop - start - 1 - index - MARGIN for index in range(stop - start)]
    return [float(min(max(min(pair), 0), full)) for pair in zip(before, after, strict=True)]


def _spans(side: int) -> Iterator[tuple[int, int]]:
    """As few tiles as ``TILE`` allows, all of one size: a last tile of full size would repeat its neighbour's work.

    The last one ends with the image. It starts on the network's grid, since both sides are multiples.
    """
    count = max(1, -(-(side - OVERLAP) // (TILE - OVERLAP)))
    length = min(-(-(side + (count - 1) * OVERLAP) // (count * STEP)) * STEP, TILE, side)
    for i in range(count):
        first = min(i * (length - OVERLAP), side - length)
        yield first, first + length
