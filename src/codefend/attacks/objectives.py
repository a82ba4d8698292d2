"""Objectives: images ``[B, 3, H, W]`` -> ``[B]``, lower is better for the attacker.

Each is made from a victim, bare or defended: an attack never knows which, nor that a language model is behind it.
The batch is fixed when the objective is made: prompts, answers and reference images line up with the images' rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from codefend.types import CodefendError, Objective, Victim, WhiteBox

WORD_TEMPERATURE = 0.05  # of a cross-entropy over cosines


@runtime_checkable
class HasMargins(Protocol):
    """A victim that shows its logits, as far as margins need them."""

    def margins(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> list[Tensor]:
        """For each image ``[L_i]``: the logit of each token of its target less the largest other logit there."""
        ...


@runtime_checkable
class HasWords(Protocol):
    """A victim whose vision tokens and words share a space."""

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        """Cosine of each vision token to each word or phrase, ``[B, T, C]``."""
        ...


def untargeted(victim: WhiteBox, prompts: Sequence[str], answers: Sequence[str]) -> Objective:
    """Minus the mean negative log-likelihood (nats per token) of the true answer: make it unlikely."""
    _check_rows(prompts, answers)

    def objective(images: Tensor) -> Tensor:
        return -victim.loss(images, prompts, answers)

    return objective


def targeted(victim: WhiteBox, prompts: Sequence[str], targets: Sequence[str]) -> Objective:
    """Mean negative log-likelihood (nats per token) of the attacker's sentence: make it likely."""
    _check_rows(prompts, targets)

    def objective(images: Tensor) -> Tensor:
        return victim.loss(images, prompts, targets)

    return objective


def margin(victim: WhiteBox, prompts: Sequence[str], answers: Sequence[str], *, confidence: float = 5.0) -> Objective:
    """Mean over the answer's tokens of ``max(z_true - max other, -confidence)``: put another token first everywhere.

    The logit margin f6 of Carlini & Wagner 2017 (arXiv 1608.04644, sec. V-A) instead of the likelihood, whose gradient
    fades where the model is sure. ``confidence`` (logits) is where a token stops paying: effort goes to those that
    still hold. Raises CodefendError when the victim shows no logits.
    """
    _check_rows(prompts, answers)
    shown = _with_margins(victim)

    def objective(images: Tensor) -> Tensor:
        found = shown.margins(images, prompts, answers)
        return torch.stack([m.clamp_min(-confidence).mean() for m in found])

    return objective


def margin_targeted(
    victim: WhiteBox, prompts: Sequence[str], targets: Sequence[str], *, confidence: float = 5.0
) -> Objective:
    """Mean over the sentence's tokens of ``max(max other - z_target, -confidence)``: put each of them first.

    Greedy decoding says the sentence exactly when every margin is positive. Raises as `margin` does.
    """
    _check_rows(prompts, targets)
    shown = _with_margins(victim)

    def objective(images: Tensor) -> Tensor:
        found = shown.margins(images, prompts, targets)
        return torch.stack([(-m).clamp_min(-confidence).mean() for m in found])

    return objective


def _with_margins(victim: object) -> HasMargins:
    if not (isinstance(victim, HasMargins) and isinstance(_undefended(victim), HasMargins)):
        raise CodefendError(f"victim {getattr(victim, 'name', victim)!r} shows no logits: use apgd instead of a margin")
    return victim


def _undefended(victim: Any) -> object:
    """What a defended victim defends: it passes everything on, whether there is anything behind it or not."""
    while hasattr(victim, "victim"):
        victim = victim.victim
    return victim


def features_away(victim: WhiteBox, clean_images: Tensor, *, reference: WhiteBox | None = None) -> Objective:
    """Mean cosine in [-1, 1] of all vision tokens to those of the clean image (VEAttack, ICLR 2026).

    ``reference`` gives the clean tokens; by default the attacked victim itself. The gradient is zero at the clean
    image when both are the same and deterministic: start from a random point.
    """
    with torch.no_grad():
        clean_tokens = (reference or victim).features(clean_images)

    def objective(images: Tensor) -> Tensor:
        return cosine_similarity(victim.features(images), clean_tokens, dim=-1).mean(1)

    return objective


def features_towards(victim: WhiteBox, target_images: Tensor, *, reference: WhiteBox | None = None) -> Objective:
    """Minus the mean cosine of all vision tokens to those of a target image (AttackVLM's MF-ii, Zhao et al. 2023).

    ``target_images`` is ``[B, 3, H, W]``, or ``[1, 3, H, W]`` for one target shared by the batch.
    """
    with torch.no_grad():
        target_tokens = (reference or victim).features(target_images)

    def objective(images: Tensor) -> Tensor:
        return -cosine_similarity(victim.features(images), target_tokens, dim=-1).mean(1)

    return objective


def features_towards_text(victim: WhiteBox, texts: Sequence[str]) -> Objective:
    """Minus the mean cosine of all vision tokens to a text in the space they share (AttackVLM's MF-it, 2305.16934).

    Raises CodefendError when the victim has no such space.
    """
    shown, _ = _worded(victim, "feature-target")
    distinct = list(dict.fromkeys(texts))
    columns = torch.tensor([distinct.index(text) for text in texts])

    def objective(images: Tensor) -> Tensor:
        scores = shown.word_scores(images, distinct).mean(1)  # [B, C]
        return -scores.gather(1, columns.to(scores.device).unsqueeze(1)).squeeze(1)

    return objective


def words_away(victim: WhiteBox, clean_images: Tensor) -> Objective:
    """Minus the mean cross-entropy of each vision token's words: away from what the undefended victim reads there.

    The nearest word of its ``vocabulary`` counts as right. Raises CodefendError when the victim has none.
    """
    shown, bare = _worded(victim, "feature")
    words: Sequence[str] = getattr(bare, "vocabulary", ())
    if not words:
        raise CodefendError(f"victim {victim.name!r} says no vocabulary that its tokens could be read in: use feature")
    with torch.no_grad():
        read = bare.word_scores(clean_images, words).argmax(-1)

    def objective(images: Tensor) -> Tensor:
        return -word_loss(shown.word_scores(images, words), read)

    return objective


def word_loss(scores: Tensor, words: Tensor) -> Tensor:
    """Mean cross-entropy ``[B]`` of word scores ``[B, T, C]`` (cosines) with the tokens' words ``[B, T]``."""
    losses = cross_entropy((scores / WORD_TEMPERATURE).flatten(0, 1), words.flatten(), reduction="none")
    return losses.view(words.shape).mean(1)


def _worded(victim: WhiteBox, instead: str) -> tuple[HasWords, HasWords]:
    """The victim and what it defends. Raises CodefendError when it has no space that vision tokens and words share."""
    bare = _undefended(victim)
    if not (hasattr(victim, "word_scores") and isinstance(bare, HasWords)):
        raise CodefendError(f"victim {victim.name!r} has no space that vision tokens and words share: use {instead}")
    return cast(HasWords, victim), bare


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
    hypothesis, wanted = ("".join(t.lower().split()) for t in (text, reference))
    precisions, recalls = [], []
    for n in range(1, order + 1):
        ours, theirs = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (hypothesis, wanted))
        if not theirs:
            break
        common = (ours & theirs).total()
        precisions.append(common / max(ours.total(), 1))
        recalls.append(common / theirs.total())
    if not recalls:
        return float(hypothesis == wanted)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def answers_away(victim: Victim, prompts: Sequence[str], answers: Sequence[str]) -> Objective:
    """Similarity of the victim's answer to the true one, for victims that only answer text. No gradient."""
    _check_rows(prompts, answers)
    return answers_scored(
        victim, prompts, lambda said: [text_similarity(a, t) for a, t in zip(said, answers, strict=True)]
    )


def answers_towards(victim: Victim, prompts: Sequence[str], targets: Sequence[str]) -> Objective:
    """Minus the similarity of the answer to the attacker's sentence (AttackVLM's MF-tt, 2305.16934). No gradient.

    The paper compares CLIP embeddings of the texts; character n-grams need no weights.
    """
    _check_rows(prompts, targets)
    return answers_scored(
        victim, prompts, lambda said: [-text_similarity(a, t) for a, t in zip(said, targets, strict=True)]
    )


class Ensemble:
    """Mean of several objectives; ``parts`` lets attacks that know ensembles visit them one by one (ssa-cwa)."""

    def __init__(self, parts: Sequence[Objective]) -> None:
        if not parts:
            raise CodefendError("an ensemble needs at least one objective")
        self.parts = tuple(parts)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([part(images) for part in self.parts]).mean(0)


def worst_branch(branches: Sequence[Objective]) -> Objective:
    """The highest of several objectives: against a gate, success must hold on the branch with and without repair."""

    def objective(images: Tensor) -> Tensor:
        return torch.stack([branch(images) for branch in branches]).amax(0)

    return objective


def evading(
    objective: Objective, detector: Callable[[Tensor], Tensor], limit: float | Tensor, *, weight: float
) -> Objective:
    """``objective`` plus ``weight * max(detector - limit, 0)``: succeed and stay under a detector's threshold.

    ``detector`` maps images to scores ``[B]``, higher is more suspicious; ``limit`` is one number or ``[B]``. A
    feasible image pays nothing, so ``weight`` only has to be large beside the objective's own range (Carlini & Wagner
    2017, arXiv 1705.07263).
    """

    def evasive(images: Tensor) -> Tensor:
        return objective(images) + weight * (detector(images) - limit).clamp_min(0)

    return evasive


def raising_alarm(detector: Callable[[Tensor], Tensor]) -> Objective:
    """Minus the detector's score: make it refuse a harmless picture."""

    def objective(images: Tensor) -> Tensor:
        return -detector(images)

    return objective


def eot(objective: Objective, n: int) -> Objective:
    """Mean over ``n`` evaluations of a stochastic objective (Athalye et al. 2018, expectation over transformation).

    Its gradient holds ``n`` graphs at once; attacks use ``Budget.eot`` instead, which holds one.
    """

    def mean(images: Tensor) -> Tensor:
        return torch.stack([objective(images) for _ in range(n)]).mean(0)

    return mean


class Counted:
    """An objective that counts how often it was asked: ``calls``, each of one batch."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.calls = objective, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.objective(images)


def _check_rows(prompts: Sequence[str], texts: Sequence[str]) -> None:
    if len(prompts) != len(texts):
        raise CodefendError(f"{len(prompts)} prompts but {len(texts)} answers: give one of each per image")
