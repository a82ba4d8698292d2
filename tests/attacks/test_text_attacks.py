"""Every text attack of the table fulfils one contract."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attacks_kit import ANSWERS, QUESTIONS, Dim, PromptReader, sample_images, seeded
from codefend.attacks import TEXT_ATTACKS, TextAttackSpec
from codefend.attacks.base import Trace
from codefend.attacks.norms import distance
from codefend.attacks.objectives import prompt_objective_for
from codefend.attacks.prompt_injection import PlantedInstruction
from codefend.defense import DefendedVictim, Defense
from codefend.types import Budget, CodefendError, Objective

BUDGET = Budget("linf", 8 / 255, 12)
every_attack = pytest.mark.parametrize("spec", TEXT_ATTACKS.values(), ids=lambda spec: spec.name)


class BlackBox:
    """A black box that repeats the sentence of an instruction."""

    name = "box"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return [p.rpartition("say exactly: ")[2].split("\n")[0] if "say exactly" in p else "a cat" for p in prompts]


@every_attack
@pytest.mark.parametrize("defended", [False, True])
def test_every_attack_fulfils_the_contract(spec: TextAttackSpec, defended: bool) -> None:
    clean, victim = sample_images(), PromptReader()
    attacked_victim = DefendedVictim(victim, Defense(purifier=Dim(), name="dim")) if defended else victim
    objective = prompt_objective_for(spec, attacked_victim, ANSWERS, "target")
    before = clean.clone()
    images, prompts = spec.build("target")(objective, clean, QUESTIONS, BUDGET, generator=seeded())
    assert torch.equal(clean, before)
    assert images.shape == clean.shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert len(prompts) == 3
    if spec.changes == "prompt":
        assert torch.equal(images, clean)
    if spec.changes == "image":
        assert prompts == QUESTIONS
    if spec.changes == "both":
        assert (distance(images, clean, "linf") <= BUDGET.eps + 1e-6).all()
    assert (objective(prompts)(images) <= objective(QUESTIONS)(clean) + 1e-6).all()
    assert objective(prompts)(images).mean() < objective(QUESTIONS)(clean).mean() - 1e-3
    again = spec.build("target")(objective, clean, QUESTIONS, BUDGET, generator=seeded())
    assert torch.equal(again[0], images)
    assert again[1] == prompts


@every_attack
def test_nan_objective_changes_nothing(spec: TextAttackSpec) -> None:
    def objective(prompts: Sequence[str]) -> Objective:
        return lambda images: images.flatten(1).sum(1) * float("nan")

    images, prompts = spec.build("")(objective, sample_images(), QUESTIONS, Budget(steps=3), generator=seeded())
    assert torch.equal(images, sample_images())
    assert prompts == QUESTIONS


@every_attack
def test_trace_records_every_evaluation(spec: TextAttackSpec) -> None:
    trace, attack = Trace(), spec.build("target")
    assert trace.attach(attack)
    attack(
        prompt_objective_for(spec, PromptReader(), ANSWERS, "target"),
        sample_images(),
        QUESTIONS,
        BUDGET,
        generator=seeded(),
    )
    assert trace.losses
    assert all(losses.shape == (3,) for losses in trace.losses)
    assert bool(trace.gradient_norms) == (spec.threat == "white-box")


@every_attack
def test_every_spec_is_complete(spec: TextAttackSpec) -> None:
    assert TEXT_ATTACKS[spec.name] is spec
    assert spec.build("x").name == spec.name
    assert spec.summary
    assert "\n" not in spec.summary
    assert spec.source
    assert spec.steps > 0


def test_text_attacks_on_black_boxes_use_answers_only() -> None:
    clean = sample_images()
    images, prompts = PlantedInstruction(sentence="a dog")(
        prompt_objective_for(TEXT_ATTACKS["planted"], BlackBox(), ANSWERS, "a dog"), clean, QUESTIONS, Budget(steps=5)
    )
    assert BlackBox().generate(images, prompts) == ["a dog"] * 3
    with pytest.raises(CodefendError, match="only answers text"):
        prompt_objective_for(TEXT_ATTACKS["joint"], BlackBox(), ANSWERS, "")
    with pytest.raises(CodefendError, match="sentence"):
        prompt_objective_for(TEXT_ATTACKS["planted"], BlackBox(), ANSWERS, "")
