"""Detection of attacked images from the part that purification removes, the residual. Calibrated, differentiable.

The size of the residual is FlowPure's detector in its deterministic form (||v||^2, arXiv 2505.13280). Clean images with
much texture have large residuals as well, perturbations are finer than the detail that purification loses, patches are
confined to one place, and camera noise is distributed otherwise over scales, colours and sizes. A logistic regression
on eight features separates them, without another evaluation of the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.types import CodefendError

FLOOR = 1e-4  # a fortieth of an 8-bit level: keeps logarithms and their gradients finite
TEXTURE_FLOOR = 0.01  # 2.5 levels: below it, smoother images have no smaller residuals
BLOCK = 8  # pixels
TEXTURE = 3  # index of the texture among the features
SIZES = 4, 8  # numbers of features: older weights have detectors of the first four
RAMP = 2.0  # range of the logit below the threshold in which a gate opens


def features(images: Tensor, purified: Tensor, *, texture_floor: float = TEXTURE_FLOOR) -> Tensor:
    """Features ``[B, 8]`` of a detector: logarithms of magnitudes, in [0, 1] pixels.

    RMS of the residual, of its high-pass part, of its largest block, and of the texture; RMS of the residual's grey
    part and of its high-pass part at a half and a quarter of the resolution; its mean absolute value. ``images`` and
    ``purified`` are ``[B,3,H,W]``; the texture is the high-pass part of the purified image, at least ``texture_floor``.
    """
    wide = torch.promote_types(images.dtype, torch.float32)  # squares of a fine residual vanish in half precision
    images, purified = images.to(wide), purified.to(wide)
    residual = images - purified
    block = _pooled(residual.square().mean(1, keepdim=True), BLOCK).flatten(1).amax(1)
    grey = _power(residual.mean(1, keepdim=True))
    half, quarter = (_power(_high_pass(_pooled(residual, by))) for by in (2, 4))
    mean = residual.abs().flatten(1).mean(1)
    powers = [_power(residual), _power(_high_pass(residual)), block, _power(_high_pass(purified)), grey, half, quarter]
    squares = torch.stack([*powers, mean.square()], 1)
    floors = squares.new_full((squares.shape[1],), FLOOR)
    floors[TEXTURE] = texture_floor
    return 0.5 * (squares + floors.square()).log()


def _pooled(images: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(images, min(side, *images.shape[-2:]))


def _high_pass(images: Tensor) -> Tensor:
    return images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)


def _power(images: Tensor) -> Tensor:
    return images.square().flatten(1).mean(1)


@dataclass(frozen=True)
class Detector:
    """A logistic regression on `features` and the threshold above which an image counts as attacked.

    Saved in the weights' config.json.

    >>> detector = Detector(weights=(1.0, 0.0, 0.0, 0.0), bias=4.0, threshold=0.5, false_positive_rate=0.01)
    >>> images = torch.zeros(1, 3, 16, 16)
    >>> [round(float(detector(images, images + shift)), 2) for shift in (0.0, 0.1)]
    [0.01, 0.85]
    """

    weights: tuple[float, ...]
    bias: float
    threshold: float  # of the score
    false_positive_rate: float  # share of clean images above it, measured on images that the fit didn't use
    calibration: Mapping[str, Any] = field(default_factory=dict)  # data, and detection rates
    texture_floor: float = FLOOR  # the default is that of older weights

    def __call__(self, images: Tensor, purified: Tensor) -> Tensor:
        """Score in (0, 1), ``[B]``: the probability of an attack where half of the images are attacked."""
        return self.logit(images, purified).sigmoid()

    def logit(self, images: Tensor, purified: Tensor) -> Tensor:
        """The score before the sigmoid, ``[B]``: for attacks, since its gradient doesn't saturate."""
        inputs = features(images, purified, texture_floor=self.texture_floor)[:, : len(self.weights)]
        return inputs @ inputs.new_tensor(self.weights) + self.bias

    @property
    def limit(self) -> float:
        """The threshold as a logit, finite also for a score that float32 rounds to 0 or 1."""
        share = min(max(self.threshold, 1e-6), 1 - 1e-6)
        return math.log(share / (1 - share))

    def gate_share(self, images: Tensor, purified: Tensor) -> Tensor:
        """Share of the purification that a gate applies, ``[B]``: 1 from the threshold on, 0 from `RAMP` below it.

        Linear in between: continuous, with a gradient for attacks.
        """
        return (1 + (self.logit(images, purified) - self.limit) / RAMP).clamp(0, 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Detector:
        """Inverse of `to_dict` through JSON. Raises CodefendError when a field is missing or unknown."""
        try:
            detector = cls(**{**values, "weights": tuple(float(w) for w in values["weights"])})
        except (KeyError, TypeError, ValueError) as error:
            raise CodefendError(
                f"the weights' detector is not readable ({error}); run `codefend calibrate` again"
            ) from error
        if len(detector.weights) not in SIZES:
            count = len(detector.weights)
            raise CodefendError(f"the weights' detector has {count} features, not 8; run `codefend calibrate` again")
        return detector


def threshold_at(clean_scores: Tensor, rate: float) -> float:
    """The lowest threshold that at most ``rate`` of the clean scores ``[N]`` exceed."""
    ordered = clean_scores.sort(descending=True).values
    return float(ordered[int(rate * len(ordered))])
