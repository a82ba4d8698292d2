"""Adaptive attacks: the defense as an attack differentiates it, and objectives that also evade its detector."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from codefend.attacks.objectives import evading
from codefend.bench.config import AdaptiveOptions
from codefend.bench.defenses import EvaluatedDefense
from codefend.bench.setup import Bench
from codefend.defense import Defense, StraightThrough
from codefend.types import Objective, Purifier


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


def _layers(purifier: Purifier) -> list[Any]:
    """The wrappers that fix its noise or its gradient, the outermost first, and the purifier itself."""
    layers: list[Any] = [purifier]
    while hasattr(layers[-1], "purifier"):
        layers.append(layers[-1].purifier)
    return layers


def unwrapped(purifier: Purifier) -> Any:
    """The purifier inside the wrappers that fix its noise or its gradient."""
    return _layers(purifier)[-1]


def _unguided(purifier: Purifier) -> Purifier:
    """The same in copies of its wrappers, without guidance, which comes after the detector."""
    layers = [copy(layer) for layer in _layers(purifier)]
    if getattr(layers[-1], "guidance", None) is None:
        return purifier
    layers[-1].guidance = None
    for outer, inner in pairwise(layers):
        outer.purifier = inner
    unguided: Purifier = layers[0]
    return unguided


def detection_score(purifier: Purifier, images: Tensor, purified: Tensor) -> Tensor:
    """How suspicious ``purifier`` finds each image, ``[B]``, in units whose gradient doesn't fade.

    The logit of a calibrated detector, else the root mean square of the removed part in 8-bit levels. ``purified`` is
    the purifier's output before guidance and gate.
    """
    detector = getattr(unwrapped(purifier), "detector", None)
    if detector is not None:
        logits: Tensor = detector.logit(images, purified)
        return logits
    return 255 * ((images - purified).square().flatten(1).mean(1) + 1e-12).sqrt()


def evasive_objective(
    objective: Objective, purifier: Purifier, clean: Tensor, weight: float, generator: Generator | None
) -> Objective:
    """``objective`` with a penalty on detection scores above the detector's threshold, else above the clean image's.

    Each evaluation costs another purification. Carlini & Wagner 2017 (arXiv 1705.07263): attacks that aim at a detector
    evade it.
    """
    defense = Defense(_unguided(purifier))
    detached = any(isinstance(layer, StraightThrough) for layer in _layers(purifier))

    def score(images: Tensor) -> Tensor:
        purified = defense.images(images, generator=generator)
        # An identity gradient of the purifier would cancel the residual's own: there would be nothing to descend.
        # A gate changes nothing here: it is fully open wherever there is a penalty.
        return detection_score(purifier, images, purified.detach() if detached else purified)

    detector = getattr(unwrapped(purifier), "detector", None)
    if detector is not None:
        return evading(objective, score, detector.limit, weight=weight)
    with torch.no_grad():
        limit = score(clean)
    return evading(objective, score, limit, weight=weight)
