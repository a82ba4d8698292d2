"""Attacks: each lowers an ``Objective`` inside a bound; one file each, listed in ``ATTACKS`` and ``TEXT_ATTACKS``.

Importing this module does not import torch: attacks and objectives load when one is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from codefend.attacks.specs import NEEDS_SENTENCE, AttackSpec, Bound, Goal, TextAttackSpec, Threat
from codefend.attacks.table import ATTACKS, EVERY_ATTACK, TEXT_ATTACKS
from codefend.types import CodefendError, Objective, Victim, WhiteBox

if TYPE_CHECKING:
    from torch import Tensor

    from codefend.attacks.text import Asked

__all__ = [
    "ATTACKS",
    "EVERY_ATTACK",
    "NEEDS_SENTENCE",
    "TEXT_ATTACKS",
    "AttackSpec",
    "Bound",
    "Goal",
    "TextAttackSpec",
    "Threat",
    "asked_for",
    "objective_for",
]


def objective_for(
    spec: AttackSpec | TextAttackSpec,
    victim: Victim,
    prompts: Sequence[str],
    answers: Sequence[str],
    target: str | Sequence[str],
    clean_images: Tensor,
    target_images: Tensor | None = None,
) -> Objective:
    """What ``spec`` lowers on this batch; ``target`` is one sentence for all images or one each.

    Raises CodefendError when the attack needs a target sentence or image that was not given, or a gradient, logits or
    words that the victim does not show.
    """
    from codefend.attacks import objectives

    targets = _targets(spec, target, len(prompts)) if spec.goal in NEEDS_SENTENCE else []
    if spec.goal == "answer":
        return objectives.answers_away(victim, prompts, answers)
    if spec.goal == "answer-target":
        return objectives.answers_towards(victim, prompts, targets)
    shown = _white_box(spec, victim)
    if spec.goal == "feature":
        return objectives.features_away(shown, clean_images)
    if spec.goal == "feature-target":
        if target_images is None:
            raise CodefendError(f"attack {spec.name!r} needs target images: give one, or one per image")
        return objectives.features_towards(shown, target_images)
    if spec.goal == "feature-text":
        return objectives.features_towards_text(shown, targets)
    if spec.goal == "feature-words":
        return objectives.words_away(shown, clean_images)
    if spec.goal == "margin":
        return objectives.margin(shown, prompts, answers)
    if spec.goal == "margin-targeted":
        return objectives.margin_targeted(shown, prompts, targets)
    if spec.goal == "targeted":
        return objectives.targeted(shown, prompts, targets)
    return objectives.untargeted(shown, prompts, answers)


def asked_for(spec: TextAttackSpec, victim: Victim, answers: Sequence[str], target: str | Sequence[str]) -> Asked:
    """What ``spec`` lowers, as a function of the prompts: likelihoods, or the answers of a victim that shows no more.

    Raises CodefendError when the attack needs a target sentence that was not given, or a gradient from a black box.
    """
    from codefend.attacks import objectives

    wanted = _targets(spec, target, len(answers)) if spec.goal in NEEDS_SENTENCE else list(answers)
    targeted = spec.goal in NEEDS_SENTENCE
    if spec.threat == "score" and not _is_white_box(victim):
        judge = objectives.answers_towards if targeted else objectives.answers_away
        return lambda prompts: judge(victim, prompts, wanted)
    shown, likelihood = _white_box(spec, victim), objectives.targeted if targeted else objectives.untargeted
    return lambda prompts: likelihood(shown, prompts, wanted)


def _targets(spec: AttackSpec | TextAttackSpec, target: str | Sequence[str], count: int) -> list[str]:
    targets = [target] * count if isinstance(target, str) else list(target)
    if not all(targets):
        raise CodefendError(f"attack {spec.name!r} needs a target sentence: the task has none, so give one")
    return targets


def _is_white_box(victim: Victim) -> bool:
    return isinstance(getattr(victim, "victim", victim), WhiteBox)  # a defended victim is what it defends


def _white_box(spec: AttackSpec | TextAttackSpec, victim: Victim) -> WhiteBox:
    if not _is_white_box(victim):
        raise CodefendError(
            f"attack {spec.name!r} needs a loss, and victim {victim.name!r} only answers text: "
            "use square-text, mf-tt or a text attack"
        )
    return cast(WhiteBox, victim)
