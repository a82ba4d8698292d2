"""The base class of image encoders."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Encoder(nn.Module):
    """A frozen image encoder of images ``[B, 3, H, W]`` in [0, 1], differentiable in the images.

    A subclass writes `features`. H and W are multiples of ``multiple``.
    """

    name: str
    width: int  # of a feature vector
    multiple: int = 32  # pixels

    def features(self, images: Tensor) -> Tensor:
        """Vision tokens ``[B, T, width]``, row by row."""
        raise NotImplementedError

    def local_features(self, images: Tensor) -> Tensor:
        """Features ``[B, T, D]`` of an early layer that depend on nearby pixels alone; `features` unless overridden."""
        return self.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @cached_property
    def local_multiply_adds(self) -> float:
        """Multiply-adds of `local_features`, per pixel."""
        images = torch.zeros(1, 3, 2 * self.multiple, 2 * self.multiple, device=self.device)
        with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.local_features(images)
        return float(counter.get_total_flops() / 2 / images[0, 0].numel())


class Classifier(Encoder):
    """An encoder with a head of classes; a subclass writes `logits` as well."""

    def logits(self, images: Tensor) -> Tensor:
        """Class scores ``[B, classes]``."""
        raise NotImplementedError
