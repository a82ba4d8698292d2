"""Adaptive means: what an attacker who sees the defense puts in place of its exact gradient, or adds to the goal."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from codefend.attacks.objectives import evading
from codefend.bench.config import AttackChoice
from codefend.bench.setup import Bench, Contender
from codefend.defense import Defense, StraightThrough
from codefend.types import Objective, Purifier


def seen_through(bench: Bench, contender: Contender, choice: AttackChoice) -> Defense:
    """The defense as this attack differentiates it."""
    defense = contender.adaptive
    if choice.means.process:
        defense = replace(defense, purifier=bench.shorter[contender.label, choice.means.process])
    if choice.means.bpda and defense.purifier is not None and contender.gradient == "exact":
        defense = replace(defense, purifier=StraightThrough(defense.purifier))
    return defense


def makes_sense(bench: Bench, defense: str, choice: AttackChoice) -> bool:
    """Whether the attack's means change anything about this defense."""
    contender, means = bench.contenders[defense], choice.means
    if contender.defense.purifier is None:
        return not (means.bpda or means.process or means.evade)
    if means.process and (defense, means.process) not in bench.shorter:
        return False
    return not means.bpda or contender.gradient == "exact"


def _layers(purifier: Purifier) -> list[Any]:
    """The wrappers that fix its noise or its gradient, the outermost first, and the purifier itself."""
    found: list[Any] = [purifier]
    while hasattr(found[-1], "purifier"):
        found.append(found[-1].purifier)
    return found


def unwrapped(purifier: Purifier) -> Any:
    """The purifier inside the wrappers that fix its noise or its gradient."""
    return _layers(purifier)[-1]


def _unguided(purifier: Purifier) -> Purifier:
    """The same in copies of its wrappers, without guidance: what a detector goes by is known before that."""
    layers = [copy(layer) for layer in _layers(purifier)]
    if getattr(layers[-1], "guidance", None) is None:
        return purifier
    layers[-1].guidance = None
    for outer, inner in pairwise(layers):
        outer.purifier = inner
    found: Purifier = layers[0]
    return found


def suspicion(purifier: Purifier, images: Tensor, purified: Tensor) -> Tensor:
    """How suspicious ``purifier`` finds each picture, ``[B]``, in units that an attacker can descend.

    The logit of a calibrated detector, else the root mean square of what was removed in 8-bit levels. ``purified`` is
    what it makes of the pictures before guidance moves them and a gate lets them pass.
    """
    detector = getattr(unwrapped(purifier), "detector", None)
    if detector is not None:
        logits: Tensor = detector.logit(images, purified)
        return logits
    return 255 * ((images - purified).square().flatten(1).mean(1) + 1e-12).sqrt()


def unsuspected(
    objective: Objective, purifier: Purifier, clean: Tensor, weight: float, generator: Generator | None
) -> Objective:
    """``objective`` with a fine on pictures more suspicious than the detector's threshold or, without one, than clean.

    Costs another purification per look. Carlini & Wagner 2017 (arXiv 1705.07263): detectors fall to whoever aims at
    them, too.
    """
    defense = Defense(_unguided(purifier))
    detached = any(isinstance(layer, StraightThrough) for layer in _layers(purifier))

    def score(images: Tensor) -> Tensor:
        purified = defense.images(images, generator=generator)
        # A backward pass as of the identity would cancel the residual's own gradient: nothing to descend would be left.
        # A gate changes nothing here: it is wide open wherever there is a fine.
        return suspicion(purifier, images, purified.detach() if detached else purified)

    detector = getattr(unwrapped(purifier), "detector", None)
    if detector is not None:
        return evading(objective, score, detector.limit, weight=weight)
    with torch.no_grad():
        limit = score(clean)
    return evading(objective, score, limit, weight=weight)
