"""How suspicious a picture is, from what purification took out of it: calibrated, free, and differentiable.

The size of the residual is FlowPure's detector in its deterministic form (||v||^2, arXiv 2505.13280). But a busy
picture loses more than a plain one when nobody attacks, a perturbation is finer than what else is lost, a patch sits
in one place, and the noise of a camera is spread over scales, colours and sizes otherwise than an attack: a logistic
regression tells them apart. It needs no evaluation beside the purification's own.
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
TEXTURE_FLOOR = 0.01  # 2.5 levels: a smoother picture leaves no smaller residual, so it counts as this smooth
BLOCK = 8  # pixels
TEXTURE = 3  # its place among the features
SIZES = 4, 8  # how many features a detector goes by, the first ones: four in weights from before there were more
RAMP = 2.0  # of the logit below the threshold, over which a gate opens


def features(images: Tensor, purified: Tensor, *, texture_floor: float = TEXTURE_FLOOR) -> Tensor:
    """``[B, 8]``, logarithms of sizes in [0, 1] pixels.

    RMS of the residual, of its fine part, of its worst block, and of the texture; RMS of the residual's grey part and
    of what is fine in it at a half and a quarter of the resolution; its mean absolute value. ``images`` and
    ``purified`` are ``[B,3,H,W]``; the texture is the fine part of the purified picture, never taken for less than
    ``texture_floor``.
    """
    wide = torch.promote_types(images.dtype, torch.float32)  # squares of a fine residual vanish in half precision
    images, purified = images.to(wide), purified.to(wide)
    residual = images - purified
    worst = _pooled(residual.square().mean(1, keepdim=True), BLOCK).flatten(1).amax(1)
    grey = _power(residual.mean(1, keepdim=True))
    half, quarter = (_power(_fine(_pooled(residual, by))) for by in (2, 4))
    mean = residual.abs().flatten(1).mean(1)
    powers = [_power(residual), _power(_fine(residual)), worst, _power(_fine(purified)), grey, half, quarter]
    squares = torch.stack([*powers, mean.square()], 1)
    floors = squares.new_full((squares.shape[1],), FLOOR)
    floors[TEXTURE] = texture_floor
    return 0.5 * (squares + floors.square()).log()


def _pooled(images: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(images, min(side, *images.shape[-2:]))


def _fine(images: Tensor) -> Tensor:
    return images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)


def _power(images: Tensor) -> Tensor:
    return images.square().flatten(1).mean(1)


@dataclass(frozen=True)
class Detector:
    """A fitted score and the threshold above which a picture counts as attacked; lives in the weights' config.json."""

    weights: tuple[float, ...]
    bias: float
    threshold: float  # of the score
    false_positive_rate: float  # share of clean pictures above it, measured on pictures that no fit has seen
    calibration: Mapping[str, Any] = field(default_factory=dict)  # on what, and what it detects
    texture_floor: float = FLOOR  # what those had that were saved before there was another

    def __call__(self, images: Tensor, purified: Tensor) -> Tensor:
        """Score in (0, 1), ``[B]``: the probability of an attack if as many pictures were attacked as not."""
        return self.logit(images, purified).sigmoid()

    def logit(self, images: Tensor, purified: Tensor) -> Tensor:
        """The score before the sigmoid, ``[B]``: an attacker descends this one, whose gradient doesn't fade."""
        found = features(images, purified, texture_floor=self.texture_floor)[:, : len(self.weights)]
        return found @ found.new_tensor(self.weights) + self.bias

    @property
    def limit(self) -> float:
        """The threshold as a logit; finite for a score that float32 rounds to 0 or 1."""
        share = min(max(self.threshold, 1e-6), 1 - 1e-6)
        return math.log(share / (1 - share))

    def suspicion(self, images: Tensor, purified: Tensor) -> Tensor:
        """How much of the purification a gate lets through, ``[B]``: all from the threshold on, none RAMP below it.

        Between them it grows evenly, so that an attacker has a gradient to follow and no edge to hide behind.
        """
        return (1 + (self.logit(images, purified) - self.limit) / RAMP).clamp(0, 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Detector:
        """Inverse of `to_dict` through JSON. Raises CodefendError when a field is missing or unknown."""
        try:
            found = cls(**{**values, "weights": tuple(float(w) for w in values["weights"])})
        except (KeyError, TypeError, ValueError) as error:
            raise CodefendError(
                f"the weights' detector is not readable ({error}); run `codefend calibrate` again"
            ) from error
        if len(found.weights) not in SIZES:
            raise CodefendError(f"the weights' detector has {len(found.weights)} features, not 8; calibrate it again")
        return found


def threshold_at(clean_scores: Tensor, rate: float) -> float:
    """The lowest threshold that at most ``rate`` of the clean scores ``[N]`` exceed."""
    ordered = clean_scores.sort(descending=True).values
    return float(ordered[int(rate * len(ordered))])
