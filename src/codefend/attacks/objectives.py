"""Objectives: images ``[B, 3, H, W]`` -> ``[B]``, lower is better for the attacker; and the one of an attack's goal.

Each is made from a victim, undefended or defended: an attack knows neither that nor that there is a language model.
The batch is fixed when the objective is made: prompts, answers and reference images line up with the images' rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

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
    from codefend.attacks.base import PromptObjective

WORD_TEMPERATURE = 0.05  # of a cross-entropy over cosines
POSSIBLE = 0.02  # of the first class's probability; above it an image may also show a class
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


def untargeted(victim: HasLoss, prompts: Sequence[str], answers: Sequence[str]) -> Objective:
    """Minus the mean negative log-likelihood (nats per token) of the true answer: make it unlikely."""
    _check_rows(prompts, answers)

    def objective(images: Tensor) -> Tensor:
        return -victim.loss(images, prompts, answers)

    return objective


def targeted(victim: HasLoss, prompts: Sequence[str], targets: Sequence[str]) -> Objective:
    """Mean negative log-likelihood (nats per token) of the attacker's sentence: make it likely."""
    _check_rows(prompts, targets)

    def objective(images: Tensor) -> Tensor:
        return victim.loss(images, prompts, targets)

    return objective


def margin(victim: HasMargins, prompts: Sequence[str], answers: Sequence[str], *, confidence: float = 5.0) -> Objective:
    """Mean over the answer's tokens of ``max(z_true - max other, -confidence)``: put another token first everywhere.

    The logit margin f6 of Carlini & Wagner 2017 (arXiv 1608.04644, sec. V-A) instead of the likelihood, whose gradient
    vanishes where the model is sure. ``confidence`` (logits) is the margin below which a token adds no gradient, so
    that the effort goes to the remaining tokens.
    """
    _check_rows(prompts, answers)

    def objective(images: Tensor) -> Tensor:
        margins = victim.margins(images, prompts, answers)
        return torch.stack([row.clamp_min(-confidence).mean() for row in margins])

    return objective


def margin_targeted(
    victim: HasMargins, prompts: Sequence[str], targets: Sequence[str], *, confidence: float = 5.0
) -> Objective:
    """Mean over the sentence's tokens of ``max(max other - z_target, -confidence)``: put each of them first.

    Greedy decoding gives the sentence exactly when every margin is positive.
    """
    _check_rows(prompts, targets)

    def objective(images: Tensor) -> Tensor:
        margins = victim.margins(images, prompts, targets)
        return torch.stack([(-row).clamp_min(-confidence).mean() for row in margins])

    return objective


def features_away(victim: HasFeatures, clean_images: Tensor, *, reference: HasFeatures | None = None) -> Objective:
    """Mean cosine in [-1, 1] of all vision tokens to those of the clean image (VEAttack, ICLR 2026).

    ``reference`` gives the clean tokens; by default the attacked victim itself. The gradient is zero at the clean
    image when both are the same and deterministic: start from a random point.
    """
    with torch.no_grad():
        clean_tokens = (reference or victim).features(clean_images)

    def objective(images: Tensor) -> Tensor:
        return cosine_similarity(victim.features(images), clean_tokens, dim=-1).mean(1)

    return objective


def features_towards(victim: HasFeatures, target_images: Tensor, *, reference: HasFeatures | None = None) -> Objective:
    """Minus the mean cosine of all vision tokens to those of a target image (AttackVLM's MF-ii, Zhao et al. 2023).

    ``target_images`` is ``[B, 3, H, W]``, or ``[1, 3, H, W]`` for one target shared by the batch.
    """
    with torch.no_grad():
        target_tokens = (reference or victim).features(target_images)

    def objective(images: Tensor) -> Tensor:
        return -cosine_similarity(victim.features(images), target_tokens, dim=-1).mean(1)

    return objective


def features_towards_text(victim: HasWordScores, texts: Sequence[str]) -> Objective:
    """Minus the mean cosine of all vision tokens to a text in the space they share (AttackVLM's MF-it, 2305.16934)."""
    distinct = list(dict.fromkeys(texts))
    columns = torch.tensor([distinct.index(text) for text in texts])

    def objective(images: Tensor) -> Tensor:
        scores = victim.word_scores(images, distinct).mean(1)  # [B, C]
        return -scores.gather(1, columns.to(scores.device).unsqueeze(1)).squeeze(1)

    return objective


def words_away(victim: HasWordScores, clean_images: Tensor, *, reference: HasWordScores | None = None) -> Objective:
    """Minus the mean cross-entropy of each vision token with its clean word, the nearest one of the ``vocabulary``.

    ``reference`` reads the clean images, usually the undefended victim; by default the attacked victim itself. Raises
    CodefendError when the vocabulary is empty.
    """
    words = victim.vocabulary
    if not words:
        raise CodefendError("the victim has an empty vocabulary, so its tokens have no nearest word: use feature")
    with torch.no_grad():
        labels = (reference or victim).word_scores(clean_images, words).argmax(-1)

    def objective(images: Tensor) -> Tensor:
        return -word_loss(victim.word_scores(images, words), labels)

    return objective


def word_loss(scores: Tensor, words: Tensor) -> Tensor:
    """Mean cross-entropy ``[B]`` of word scores ``[B, T, C]`` (cosines) with the tokens' words ``[B, T]``."""
    losses = cross_entropy((scores / WORD_TEMPERATURE).flatten(0, 1), words.flatten(), reduction="none")
    return losses.view(words.shape).mean(1)


def classes_away(
    victim: HasClassScores,
    prompts: Sequence[str],
    clean_images: Tensor,
    *,
    reference: HasClassScores | None = None,
) -> Objective:
    """Log-odds (nats) of the classes that the clean image may show; where the prompt names another, minus that one's.

    Class probabilities saturate, and with them the gradient of what a model says about them; logits don't (the reason
    of Carlini & Wagner's f6, arXiv 1608.04644). All likely classes count, since any of them may be a right answer.
    ``reference`` reads the clean images, by default the victim itself. Raises CodefendError when it has no classes.
    """
    if not victim.classes:
        raise CodefendError("the victim names no classes: use apgd")
    with torch.no_grad():
        scores = (reference or victim).class_scores(clean_images)
    shown = scores.softmax(-1) > POSSIBLE * scores.softmax(-1).amax(1, keepdim=True)
    asked = torch.stack([_named(prompt, victim.classes) for prompt in prompts]).to(shown.device) & ~shown
    towards = asked.any(1)
    group, sign = torch.where(towards[:, None], asked, shown), 1 - 2 * towards.to(clean_images.dtype)

    def objective(images: Tensor) -> Tensor:
        scores = victim.class_scores(images)
        inside, outside = (scores.masked_fill(mask, -torch.inf).logsumexp(-1) for mask in (~group, group))
        return sign * (inside - outside)

    return objective


def _named(prompt: str, classes: Sequence[str]) -> Tensor:
    """Which class a prompt names, ``[C]`` bool: the longest, since a tiger cat is no tiger."""
    words = [" ".join(["", *re.findall(r"\w+", text.lower()), ""]) for text in (prompt, *classes)]
    lengths = torch.tensor([len(name) if name in words[0] else 0 for name in words[1:]])
    return (lengths > 0) & (lengths == lengths.max())


def answers_scored(
    victim: Victim, prompts: Sequence[str], judge: Callable[[Sequence[str]], Sequence[float] | Tensor]
) -> Objective:
    """``judge`` of the generated answers, for victims that only answer text: score attacks only, no gradient."""

    def objective(images: Tensor) -> Tensor:
        scores = judge(victim.generate(images, prompts))
        return torch.as_tensor(scores, dtype=images.dtype, device=images.device)

    return objective


def text_similarity(text: str, reference: str, *, order: int = 6, beta: float = 2.0) -> float:
    """Character n-gram F-score in [0, 1] (chrF, Popovic 2015, spaces dropped): near misses score between 0 and 1."""
    hypothesis, expected = ("".join(t.lower().split()) for t in (text, reference))
    precisions, recalls = [], []
    for n in range(1, order + 1):
        ours, theirs = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (hypothesis, expected))
        if not theirs:
            break
        common = (ours & theirs).total()
        precisions.append(common / max(ours.total(), 1))
        recalls.append(common / theirs.total())
    if not recalls:
        return float(hypothesis == expected)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def answers_away(victim: Victim, prompts: Sequence[str], answers: Sequence[str]) -> Objective:
    """Similarity of the victim's answer to the true one, for victims that only answer text. No gradient."""
    _check_rows(prompts, answers)
    return answers_scored(
        victim, prompts, lambda texts: [text_similarity(a, t) for a, t in zip(texts, answers, strict=True)]
    )


def answers_towards(victim: Victim, prompts: Sequence[str], targets: Sequence[str]) -> Objective:
    """Minus the similarity of the answer to the attacker's sentence (AttackVLM's MF-tt, 2305.16934). No gradient.

    The paper compares CLIP embeddings of the texts; character n-grams need no weights.
    """
    _check_rows(prompts, targets)
    return answers_scored(
        victim, prompts, lambda texts: [-text_similarity(a, t) for a, t in zip(texts, targets, strict=True)]
    )


class Ensemble:
    """Mean of several objectives; ``parts`` lets attacks that know ensembles visit them one by one (ssa-cwa)."""

    def __init__(self, parts: Sequence[Objective]) -> None:
        if not parts:
            raise CodefendError("an ensemble needs at least one objective")
        self.parts = tuple(parts)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([part(images) for part in self.parts]).mean(0)


def evading(
    objective: Objective, detector: Callable[[Tensor], Tensor], limit: float | Tensor, *, weight: float
) -> Objective:
    """``objective`` plus ``weight * max(detector - limit, 0)``: succeed and stay under a detector's threshold.

    ``detector`` maps images to scores ``[B]``, higher is more suspicious; ``limit`` is one number or ``[B]``. There
    is no penalty under the limit, so ``weight`` only has to be large against the objective's own range (Carlini &
    Wagner 2017, arXiv 1705.07263).
    """

    def evasive(images: Tensor) -> Tensor:
        return objective(images) + weight * (detector(images) - limit).clamp_min(0)

    return evasive


def _check_rows(prompts: Sequence[str], texts: Sequence[str]) -> None:
    if len(prompts) != len(texts):
        raise CodefendError(f"{len(prompts)} prompts but {len(texts)} answers: give one of each per image")


# --- by the goal of an attack -----------------------------------------------------------------------------------------


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
    targets = _targets(spec, target, len(prompts)) if spec.goal in NEEDS_SENTENCE else []
    model = _capable(spec, victim)
    match spec.goal:
        case "untargeted":
            return untargeted(model, prompts, answers)
        case "targeted":
            return targeted(model, prompts, targets)
        case "margin":
            return margin(model, prompts, answers)
        case "margin-targeted":
            return margin_targeted(model, prompts, targets)
        case "feature":
            return features_away(model, clean_images, reference=_capable(spec, reference or victim))
        case "feature-target":
            return features_towards(model, _target_images(spec, target_images))
        case "feature-text":
            return features_towards_text(model, targets)
        case "feature-words":
            return words_away(model, clean_images, reference=_capable(spec, reference or victim))
        case "classes":
            return classes_away(model, prompts, clean_images, reference=_capable(spec, reference or victim))
        case "hidden-image":
            from codefend.attacks.scaling import HiddenImage

            kernel: Any = spec.name.removeprefix("scaling-")
            return HiddenImage(_target_images(spec, target_images), kernel)
        case "answer":
            return answers_away(victim, prompts, answers)
        case "answer-target":
            return answers_towards(victim, prompts, targets)


def prompt_objective_for(
    spec: TextAttackSpec, victim: Victim, answers: Sequence[str], target: str | Sequence[str]
) -> PromptObjective:
    """The objective of ``spec`` as a function of the prompts: likelihoods, or similarity of a black box's answers.

    Raises CodefendError when the attack needs a target sentence that is missing, or a gradient of a black box.
    """
    forces = spec.goal in NEEDS_SENTENCE
    texts = _targets(spec, target, len(answers)) if forces else list(answers)
    if spec.threat == "score" and not isinstance(victim, HasLoss):
        similarity = answers_towards if forces else answers_away
        return lambda prompts: similarity(victim, prompts, texts)
    model, likelihood = _capable(spec, victim), targeted if forces else untargeted
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
