"""Build the objective for the goal of an attack. This module imports torch only when it builds one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from codefend.attacks.specs import NEEDS_SENTENCE, AttackSpec, Goal, TextAttackSpec
from codefend.types import (
    CodefendError,
    HasClassScores,
    HasFeatures,
    HasLoss,
    HasMargins,
    HasWordScores,
    Objective,
    Victim,
)

if TYPE_CHECKING:
    from torch import Tensor

    from codefend.attacks.base import PromptObjective

BLACK_BOX = "only answers text: use square-text, mf-tt or a text attack"
# The capability that a goal requires, and the end of the error message for a victim without it.
NEEDS: dict[Goal, tuple[type, str]] = {
    "untargeted": (HasLoss, BLACK_BOX),
    "targeted": (HasLoss, BLACK_BOX),
    "margin": (HasMargins, "has no logits: use apgd"),
    "margin-targeted": (HasMargins, "has no logits: use apgd-targeted"),
    "feature": (HasFeatures, "has no vision tokens: use apgd"),
    "feature-target": (HasFeatures, "has no vision tokens: use apgd-targeted"),
    "feature-text": (HasWordScores, "has no space that vision tokens and words share: use feature-target"),
    "classes": (HasClassScores, "names no classes: use apgd"),
    "feature-words": (HasWordScores, "has no space that vision tokens and words share: use feature"),
}


def objective_for(
    spec: AttackSpec | TextAttackSpec,
    victim: Victim,
    prompts: Sequence[str],
    answers: Sequence[str],
    target: str | Sequence[str],
    clean_images: Tensor,
    target_images: Tensor | None = None,
    *,
    reference: Victim | None = None,
) -> Objective:
    """The objective of ``spec`` on this batch; ``target`` is one sentence for all images or one for each.

    ``reference`` is the undefended victim whose features ("feature") or words ("feature-words") of the clean images
    the attack turns away from; by default ``victim``. Raises CodefendError when the attack needs a target sentence or
    image that is missing, or a capability that the victim lacks.
    """
    from codefend.attacks import objectives

    targets = _targets(spec, target, len(prompts)) if spec.goal in NEEDS_SENTENCE else []
    model = _capable(spec, victim)
    match spec.goal:
        case "untargeted":
            return objectives.untargeted(model, prompts, answers)
        case "targeted":
            return objectives.targeted(model, prompts, targets)
        case "margin":
            return objectives.margin(model, prompts, answers)
        case "margin-targeted":
            return objectives.margin_targeted(model, prompts, targets)
        case "feature":
            return objectives.features_away(model, clean_images, reference=_capable(spec, reference or victim))
        case "feature-target":
            return objectives.features_towards(model, _target_images(spec, target_images))
        case "feature-text":
            return objectives.features_towards_text(model, targets)
        case "feature-words":
            return objectives.words_away(model, clean_images, reference=_capable(spec, reference or victim))
        case "classes":
            return objectives.classes_away(model, prompts, clean_images, reference=_capable(spec, reference or victim))
        case "hidden-image":
            from codefend.attacks.scaling import HiddenImage

            kernel: Any = spec.name.removeprefix("scaling-")
            return HiddenImage(_target_images(spec, target_images), kernel)
        case "answer":
            return objectives.answers_away(victim, prompts, answers)
        case "answer-target":
            return objectives.answers_towards(victim, prompts, targets)


def prompt_objective_for(
    spec: TextAttackSpec, victim: Victim, answers: Sequence[str], target: str | Sequence[str]
) -> PromptObjective:
    """The objective of ``spec`` as a function of the prompts: likelihoods, or similarity of a black box's answers.

    Raises CodefendError when the attack needs a target sentence that is missing, or a gradient of a black box.
    """
    from codefend.attacks import objectives

    targeted = spec.goal in NEEDS_SENTENCE
    texts = _targets(spec, target, len(answers)) if targeted else list(answers)
    if spec.threat == "score" and not isinstance(victim, HasLoss):
        similarity = objectives.answers_towards if targeted else objectives.answers_away
        return lambda prompts: similarity(victim, prompts, texts)
    model, likelihood = _capable(spec, victim), objectives.targeted if targeted else objectives.untargeted
    return lambda prompts: likelihood(model, prompts, texts)


def _targets(spec: AttackSpec | TextAttackSpec, target: str | Sequence[str], count: int) -> list[str]:
    targets = [target] * count if isinstance(target, str) else list(target)
    if not all(targets):
        raise CodefendError(f"attack {spec.name!r} needs a target sentence: the task has none, so give one")
    return targets


def _target_images(spec: AttackSpec | TextAttackSpec, target_images: Tensor | None) -> Tensor:
    if target_images is None:
        raise CodefendError(f"attack {spec.name!r} needs target images: give one, or one per image")
    return target_images


def check_capability(spec: AttackSpec | TextAttackSpec, victim: Victim) -> None:
    """Raise CodefendError when ``victim`` lacks what the attack requires; call it before a run folder is created."""
    answers_suffice = isinstance(spec, TextAttackSpec) and spec.threat == "score"
    if not answers_suffice:
        _capable(spec, victim)


def _capable(spec: AttackSpec | TextAttackSpec, victim: Victim) -> Any:
    """Return ``victim``. Raises CodefendError when it lacks the capability that the goal requires."""
    capability, problem = NEEDS.get(spec.goal, (object, ""))
    if not isinstance(victim, HasLoss | HasFeatures) and spec.goal in NEEDS:
        problem = BLACK_BOX
    if not isinstance(victim, capability):
        raise CodefendError(f"attack {spec.name!r} cannot attack victim {victim.name!r}, which {problem}")
    return victim
