"""A base class for purifiers of tests."""

from __future__ import annotations

from torch import Generator, Tensor

from codefend.purifiers.base import Purifier


class PlainPurifier(Purifier):
    """A purifier that is its ``forward`` alone: no padding, tiles or clipping, no guidance and no gate."""

    def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.forward(images, generator=generator)
