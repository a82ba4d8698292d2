"""Adaptive attacks: the defense as an attack differentiates it, and objectives that also evade its detector."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from codefend.attacks.objectives import evading
from codefend.bench.config import AdaptiveOptions
from codefend.bench.defenses import EvaluatedDefense
from codefend.bench.setup import Bench
from codefend.core.devices import default_device
from codefend.defense import Defense, StraightThrough
from codefend.purifiers.base import Purifier
from codefend.types import Objective


def attacked_defense(bench: Bench, evaluated: EvaluatedDefense, options: AdaptiveOptions) -> Defense:
    """The defense as an attack with these options differentiates it."""
    defense = evaluated.differentiable
    if options.process:
        defense = replace(defense, purifier=bench.shorter[evaluated.label, options.process])
    if options.bpda and defense.purifier is not None and evaluated.gradient == "exact":
        defense = replace(defense, purifier=StraightThrough(defense.purifier))
    return defense


def options_apply(bench: Bench, evaluated: EvaluatedDefense, options: AdaptiveOptions) -> bool:
    """Whether the options change the attack on this defense."""
    if evaluated.defense.purifier is None:
        return options == AdaptiveOptions()
    if options.process and (evaluated.label, options.process) not in bench.shorter:
        return False
    return not options.bpda or evaluated.gradient == "exact"


def detection_score(purifier: Purifier, images: Tensor, purified: Tensor) -> Tensor:
    """How suspicious ``purifier`` finds each image, ``[B]``, in units whose gradient doesn't fade.

    The logit of a calibrated detector, else the root mean square of the removed part in 8-bit levels. ``purified`` is
    `Purifier.transformed` of the images: before guidance and gate.
    """
    if purifier.detector is not None:
        return purifier.detector.logit(images, purified)
    return 255 * ((images - purified).square().flatten(1).mean(1) + 1e-12).sqrt()


def transformed(purifier: Purifier, images: Tensor, generator: Generator | None) -> Tensor:
    """`Purifier.transformed` on the default device, returned where the images lay."""
    return purifier.transformed(images.to(default_device()), generator=generator).to(images.device)


def evasive_objective(
    objective: Objective, purifier: Purifier, clean: Tensor, weight: float, generator: Generator | None
) -> Objective:
    """``objective`` with a penalty on detection scores above the detector's threshold, else above the clean image's.

    Each evaluation costs another purification. Carlini & Wagner 2017 (arXiv 1705.07263): attacks that aim at a detector
    evade it.
    """

    def score(images: Tensor) -> Tensor:
        purified = transformed(purifier, images, generator)
        # An identity gradient of the purifier would cancel the residual's own: there would be nothing to descend.
        return detection_score(purifier, images, purified.detach() if purifier.surrogate else purified)

    if purifier.detector is not None:
        return evading(objective, score, purifier.detector.limit, weight=weight)
    with torch.no_grad():
        limit = score(clean)
    return evading(objective, score, limit, weight=weight)
