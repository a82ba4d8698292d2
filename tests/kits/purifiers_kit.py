"""A base class for purifiers of tests, a predictor for processes, and seeded generators."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from codefend.purifiers.base import Purifier


class PlainPurifier(Purifier):
    """A purifier that is its ``forward`` alone: no padding, tiles or clipping, no guidance and no gate."""

    def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.forward(images, generator=generator)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder(nn.Module):
    """A perfect predictor that records its inputs."""

    multiple = 1

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean, self.calls = clean, list[tuple[float, float]]()

    def forward(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append((float(s[0]), float(sigma[0])))
        return self.clean
