"""Training images of any size: dead leaves, photographs and scenes, mixed by shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.tasks.dead_leaves import load_canvases
from codefend.tasks.scenes import SIZE, compose, load_photographs
from codefend.tasks.training_images import training_photographs
from codefend.types import CodefendError


@dataclass(frozen=True)
class NaturalConfig:
    """Where training images come from."""

    shares: tuple[float, ...] = (0.5, 0.25, 0.25)  # of dead leaves, photographs and scenes; relative
    canvases: int = 320  # of dead leaves
    cache: str = "runs/canvases.safetensors"  # file of the canvases: 0.4 MB each
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shares) != 3 or min(self.shares) < 0 or not sum(self.shares) > 0:
            raise CodefendError(
                f"shares must be three numbers of 0 or more, for dead leaves, photographs and scenes; got {self.shares}"
            )


class NaturalImages:
    """Images drawn from the sources of ``config``; scenes are numbered from ``first_scene`` of "train".

    Raises CodefendError when the packages with the photographs are missing.
    """

    def __init__(self, config: NaturalConfig, *, first_scene: int) -> None:
        self.first_scene = first_scene
        self.probabilities = np.asarray(config.shares) / sum(config.shares)
        count = config.canvases if config.shares[0] > 0 else 0
        self.canvases = load_canvases(config.cache, count, seed=config.seed) if count else torch.empty(0)
        self.photographs = training_photographs()

    def draw(self, rng: np.random.Generator, count: int, side: int, *, number: int) -> Tensor:
        """``[count, 3, side, side]`` in [0, 1]. Batches with different ``number`` share no scene."""
        return torch.stack([self._draw_one(rng, side, self.first_scene + number * count + i) for i in range(count)])

    def _draw_one(self, rng: np.random.Generator, side: int, scene: int) -> Tensor:
        kind = int(rng.choice(3, p=self.probabilities))
        if kind == 0:
            return random_crop(rng, self.canvases[int(rng.integers(len(self.canvases)))], side)
        if kind == 1:
            return random_crop(rng, self.photographs[int(rng.integers(len(self.photographs)))], side)
        image = compose("train", scene, photographs=load_photographs()).image
        return image if side == SIZE else random_crop(rng, image, side, widest=SIZE / side)


def random_crop(rng: np.random.Generator, image: Tensor, side: int, *, widest: float = 3.0) -> Tensor:
    """A window of an 8-bit or float image ``[3, H, W]``, resized to ``[3, side, side]`` in [0, 1].

    The window's side is one to ``widest`` times ``side``; rotated and flipped, with a little colour jitter.
    """
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    height, width = image.shape[1:]
    window = int(min(height, width, side * widest ** float(rng.random())))
    top, left = int(rng.integers(height - window + 1)), int(rng.integers(width - window + 1))
    crop = image[None, :, top : top + window, left : left + window]
    if window != side:
        crop = F.interpolate(crop, (side, side), mode="bilinear", antialias=True, align_corners=False)
    crop = torch.rot90(crop[0], int(rng.integers(4)), (1, 2))
    if rng.random() < 0.5:
        crop = crop.flip(-1)
    gain = torch.tensor(rng.uniform(0.75, 1.2, (3, 1, 1)), dtype=torch.float32)
    return ((crop - 0.5) * gain + 0.5 + float(rng.uniform(-0.1, 0.1))).clamp(0, 1)
