"""Attacks: each lowers an ``Objective`` inside a ``Budget``; one file each, listed in ``ATTACKS``.

Importing this module does not import torch: attacks and objectives load when one is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

from codefend.types import Attack, Objective, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from codefend.types import WhiteBox

Goal = Literal["untargeted", "targeted", "feature", "feature-target"]
Threat = Literal["white-box", "score", "control"]


@dataclass(frozen=True)
class AttackSpec:
    """One row of ``codefend list attacks``: what it is, where it comes from, what it must see, what it wants."""

    name: str
    summary: str
    source: str
    threat: Threat
    build: Callable[[], Attack]
    goal: Goal = "untargeted"
    steps: int = 100  # usual ``Budget.steps``: gradient steps, or queries for a score attack


def _lazy(module: str, attribute: str, **options: Any) -> Callable[[], Attack]:
    def build() -> Attack:
        return cast(Attack, getattr(import_module(f"codefend.attacks.{module}"), attribute)(**options))

    return build


def _table(*specs: AttackSpec) -> dict[str, AttackSpec]:
    return {spec.name: spec for spec in specs}


ATTACKS: dict[str, AttackSpec] = _table(
    AttackSpec(
        "pgd",
        "projected gradient descent against the true answer",
        "Madry et al. 2018, arXiv 1706.06083",
        "white-box",
        _lazy("pgd", "PGD"),
    ),
    AttackSpec(
        "pgd-targeted",
        "projected gradient descent towards the attacker's sentence",
        "Madry et al. 2018, arXiv 1706.06083; Qi et al. 2023, arXiv 2306.13213",
        "white-box",
        _lazy("pgd", "PGD", name="pgd-targeted"),
        "targeted",
    ),
    AttackSpec(
        "apgd",
        "auto-PGD against the true answer: adaptive steps and restarts from the best",
        "Croce & Hein 2020, arXiv 2003.01690",
        "white-box",
        _lazy("apgd", "APGD"),
    ),
    AttackSpec(
        "apgd-targeted",
        "auto-PGD towards the attacker's sentence",
        "Croce & Hein 2020, arXiv 2003.01690; Schlarmann & Hein 2023, arXiv 2308.10741",
        "white-box",
        _lazy("apgd", "APGD", name="apgd-targeted"),
        "targeted",
    ),
    AttackSpec(
        "feature",
        "auto-PGD that turns every vision token away from the clean ones",
        "VEAttack, ICLR 2026",
        "white-box",
        _lazy("apgd", "APGD", name="feature"),
        "feature",
    ),
    AttackSpec(
        "feature-target",
        "auto-PGD that turns the vision tokens towards another image's",
        "AttackVLM (MF-ii), Zhao et al. 2023, arXiv 2305.16934",
        "white-box",
        _lazy("apgd", "APGD", name="feature-target"),
        "feature-target",
    ),
    AttackSpec(
        "mifgsm",
        "sign steps with momentum, made to transfer",
        "Dong et al. 2018, arXiv 1710.06081",
        "white-box",
        _lazy("mifgsm", "MIFGSM"),
        steps=10,
    ),
    AttackSpec(
        "nifgsm",
        "momentum with a Nesterov look-ahead",
        "Lin et al. 2020, arXiv 1908.06281",
        "white-box",
        _lazy("mifgsm", "MIFGSM", nesterov=True, name="nifgsm"),
        steps=10,
    ),
    AttackSpec(
        "dim",
        "momentum over random resizes of the input",
        "Xie et al. 2019, arXiv 1803.06978",
        "white-box",
        _lazy("mifgsm", "MIFGSM", diversity=0.5, name="dim"),
        steps=10,
    ),
    AttackSpec(
        "cw",
        "Adam on the objective and the squared distance, inside the ball",
        "Carlini & Wagner 2017, arXiv 1608.04644",
        "white-box",
        _lazy("cw", "CW"),
    ),
    AttackSpec(
        "square",
        "random search with squares; scores only",
        "Andriushchenko et al. 2020, arXiv 1912.00049",
        "score",
        _lazy("square", "Square"),
        steps=5000,
    ),
    AttackSpec(
        "rgf",
        "sign steps along finite differences in random directions; scores only",
        "AttackVLM (MF-tt), Zhao et al. 2023, arXiv 2305.16934",
        "score",
        _lazy("rgf", "RGF"),
        steps=800,
    ),
    AttackSpec(
        "spsa",
        "Adam on two-sided random differences; scores only",
        "Uesato et al. 2018, arXiv 1802.05666",
        "score",
        _lazy("spsa", "SPSA"),
        steps=5000,
    ),
    AttackSpec(
        "noise",
        "best of ten uniform draws from the ball: the control",
        "uniform noise",
        "control",
        _lazy("noise", "Noise"),
        steps=1,
    ),
)


def objective_for(
    spec: AttackSpec,
    victim: WhiteBox,
    prompts: Sequence[str],
    answers: Sequence[str],
    target: str | Sequence[str],
    clean_images: Tensor,
    target_images: Tensor | None = None,
) -> Objective:
    """What ``spec`` lowers on this batch; ``target`` is one sentence for all images or one each.

    Raises UserError when the attack needs a target sentence or image that was not given.
    """
    from codefend.attacks import objectives

    if spec.goal == "untargeted":
        return objectives.untargeted(victim, prompts, answers)
    if spec.goal == "feature":
        return objectives.features_away(victim, clean_images)
    if spec.goal == "feature-target":
        if target_images is None:
            raise UserError(f"attack {spec.name!r} needs target images: give one, or one per image")
        return objectives.features_towards(victim, target_images)
    targets = [target] * len(prompts) if isinstance(target, str) else list(target)
    if not all(targets):
        raise UserError(f"attack {spec.name!r} needs a target sentence: the task has none, so give one")
    return objectives.targeted(victim, prompts, targets)
