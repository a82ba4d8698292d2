"""Objectives: sign conventions, one number per image, and gradients through a defense."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attacks_kit import ANSWERS, PROMPTS, CallCounter, Dim, ToyVictim, sample_images
from codefend.attacks import ATTACKS, AttackSpec, objectives
from codefend.attacks.objectives import (
    answers_scored,
    classes_away,
    features_away,
    features_towards,
    objective_for,
    targeted,
    untargeted,
)
from codefend.defense import DefendedVictim, Defense
from codefend.types import CodefendError, Victim, WhiteBox


@pytest.fixture
def images() -> Tensor:
    return sample_images()


def test_untargeted_is_minus_the_loss_of_the_answer(images: Tensor) -> None:
    victim = ToyVictim()
    losses = untargeted(victim, PROMPTS, ANSWERS)(images)
    assert losses.shape == (3,)
    assert torch.equal(losses, -victim.loss(images, PROMPTS, ANSWERS))


def test_targeted_is_the_loss_of_the_sentence(images: Tensor) -> None:
    victim = ToyVictim()
    assert torch.equal(targeted(victim, PROMPTS, ANSWERS)(images), victim.loss(images, PROMPTS, ANSWERS))


def test_features_away_is_one_at_the_clean_image_and_less_elsewhere(images: Tensor) -> None:
    objective = features_away(ToyVictim(), images)
    assert torch.allclose(objective(images), torch.ones(3), atol=1e-5)
    assert (objective(1 - images) < 0).all()


def test_features_towards_is_lowest_at_the_target_image(images: Tensor) -> None:
    target = sample_images(1, seed=9)
    objective = features_towards(ToyVictim(), target)  # one target for the batch
    at_target = objective(target.expand(3, -1, -1, -1))
    assert torch.allclose(at_target, -torch.ones(3), atol=1e-5)
    assert (objective(images) > at_target).all()


def test_feature_reference_may_be_another_victim(images: Tensor) -> None:
    bare, defended = ToyVictim(), DefendedVictim(ToyVictim(), Defense(purifier=Dim(), name="dim"))
    own = features_away(defended, images)(images)
    against_bare = features_away(defended, images, reference=bare)(images)
    assert torch.allclose(own, torch.ones(3), atol=1e-5)
    assert (against_bare < own - 1e-4).all()


def test_every_objective_has_a_gradient_through_the_defense(images: Tensor) -> None:
    victim = DefendedVictim(ToyVictim(), Defense(purifier=Dim(), policy=lambda p: p + "!", name="dim"))
    for spec in (s for s in ATTACKS.values() if not s.goal.startswith("answer")):
        objective = objective_for(spec, victim, PROMPTS, ANSWERS, "target", images, sample_images(seed=2))
        x = (images + 0.01).clamp(0, 1).requires_grad_(True)
        losses = objective(x)
        assert losses.shape == (3,)
        (grad,) = torch.autograd.grad(losses.sum(), x)
        assert (grad.flatten(1).norm(dim=1) > 0).all(), spec.name


def test_answers_can_be_scored_without_a_loss(images: Tensor) -> None:
    victim = ToyVictim()
    objective = answers_scored(victim, PROMPTS, lambda answers: [float(a[0] in "abcd") for a in answers])
    expected = [float(a[0] in "abcd") for a in victim.generate(images, PROMPTS)]
    assert objective(images).tolist() == expected


def test_call_counter_counts_calls(images: Tensor) -> None:
    counted = CallCounter(untargeted(ToyVictim(), PROMPTS, ANSWERS))
    counted(images)
    counted(images)
    assert counted.calls == 2


def test_objective_for_serves_every_goal(images: Tensor) -> None:
    victim: WhiteBox = ToyVictim()

    def value(name: str, target: str | Sequence[str] = "target") -> Tensor:
        return objective_for(ATTACKS[name], victim, PROMPTS, ANSWERS, target, images, sample_images(seed=2))(images)

    assert torch.equal(value("apgd"), -victim.loss(images, PROMPTS, ANSWERS))
    assert torch.equal(value("apgd-targeted"), victim.loss(images, PROMPTS, ["target"] * 3))
    assert torch.equal(value("apgd-targeted", ["x", "yy", "zzz"]), victim.loss(images, PROMPTS, ["x", "yy", "zzz"]))
    assert torch.equal(value("feature"), features_away(victim, images)(images))
    assert torch.equal(value("feature-target"), features_towards(victim, sample_images(seed=2))(images))


@pytest.mark.parametrize(
    ("name", "target", "missing"),
    [("feature-target", "t", "image"), *((n, "", "sentence") for n in ("pgd-targeted", "mf-it", "mf-tt"))],
)
def test_a_missing_target_is_an_error(images: Tensor, name: str, target: str, missing: str) -> None:
    with pytest.raises(CodefendError, match=missing):
        objective_for(ATTACKS[name], ToyVictim(), PROMPTS, ANSWERS, target, images)


def test_words_away_starts_from_the_words_of_the_reference(images: Tensor) -> None:
    victim, spec = ToyVictim(), ATTACKS["word-head"]
    defended = DefendedVictim(victim, Defense(purifier=Dim(), name="dim"))
    scores = victim.word_scores(images, victim.vocabulary) / 0.05
    cross_entropy = (scores.max(-1).values - scores.logsumexp(-1)).mean(1)  # minus it, with the nearest word
    assert torch.allclose(objective_for(spec, victim, PROMPTS, ANSWERS, "", images)(images), cross_entropy)
    objective = objective_for(spec, defended, PROMPTS, ANSWERS, "", images, reference=victim)
    own = objective_for(spec, defended, PROMPTS, ANSWERS, "", images)
    assert (objective(images) < cross_entropy - 1e-4).any()  # scores through the defense, words of the reference
    assert (objective(images) <= own(images) + 1e-6).all()  # against its own words the defended victim scores best
    victim.vocabulary = ()
    with pytest.raises(CodefendError, match="empty vocabulary"):
        objective_for(spec, defended, PROMPTS, ANSWERS, "", images)


class AnswersOnly:
    name = "box"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["a"] * len(prompts)


class LossOnly(AnswersOnly):
    def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1)


@pytest.mark.parametrize("defended", [False, True])
@pytest.mark.parametrize(
    ("name", "victim", "problem"),
    [
        ("apgd", AnswersOnly(), "'apgd' cannot attack .*only answers text: use square-text"),
        ("word-head", AnswersOnly(), "only answers text"),
        ("apgd-margin", LossOnly(), "no logits: use apgd"),
        ("feature", LossOnly(), "no vision tokens"),
        ("mf-it", LossOnly(), "no space that vision tokens and words share"),
    ],
)
def test_a_missing_capability_is_an_error(
    images: Tensor, name: str, victim: Victim, problem: str, defended: bool
) -> None:
    model = DefendedVictim(victim, Defense(purifier=Dim(), name="dim")) if defended else victim
    with pytest.raises(CodefendError, match=problem):
        objective_for(ATTACKS[name], model, PROMPTS, ANSWERS, "target", images)


def test_rows_must_match(images: Tensor) -> None:
    with pytest.raises(CodefendError, match="3 prompts but 1"):
        untargeted(ToyVictim(), PROMPTS, ["a"])


def test_the_table_imports_no_torch() -> None:
    code = "import sys, codefend.attacks as a; print(len(a.ATTACKS), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(len(ATTACKS)), "False"]


@pytest.mark.parametrize("spec", ATTACKS.values(), ids=lambda s: s.name)
def test_every_row_is_complete(spec: AttackSpec) -> None:
    assert ATTACKS[spec.name] is spec
    assert spec.build().name == spec.name
    assert spec.summary
    assert "\n" not in spec.summary
    assert spec.source
    assert spec.steps > 0


def test_classes_away_lowers_what_the_clean_image_shows_and_raises_what_the_prompt_asks_for(images: Tensor) -> None:
    victim = ToyVictim()
    scores = victim.class_scores(images)
    absent = [victim.classes[int(i)] for i in scores.argmin(1)]
    prompts = ["What is it?", f"Is there a {absent[1]}?", f"Is there a {absent[2]}?"]
    values = classes_away(victim, prompts, images)(images)
    odds = [math.log(p / (1 - p)) for p in scores.softmax(-1).amin(1).tolist()]
    assert values[0] > 0  # the shown classes are likely
    assert values[1:].tolist() == pytest.approx([-odds[1], -odds[2]], rel=1e-3)


def test_a_prompt_names_the_longest_class_alone() -> None:
    assert objectives._named("Is there a big ant in the photo?", ToyVictim.classes).nonzero().flatten().tolist() == [1]
    assert not objectives._named("What is in the photograph?", ToyVictim.classes).any()


def test_a_victim_without_classes_is_named(images: Tensor) -> None:
    victim = ToyVictim()
    victim.classes = ()  # type: ignore[assignment]
    with pytest.raises(CodefendError, match="names no classes"):
        classes_away(victim, PROMPTS, images)
