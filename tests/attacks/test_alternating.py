"""The attack on image and prompt."""

from __future__ import annotations

from attacks_kit import ANSWERS, QUESTIONS, PromptReader, sample_images, seeded
from codefend.attacks import TEXT_ATTACKS
from codefend.attacks.apgd import APGD
from codefend.attacks.objectives import prompt_objective_for
from codefend.types import Budget


def test_alternating_beats_image_and_prompt_alone() -> None:
    clean, victim = sample_images(), PromptReader()
    objective = prompt_objective_for(TEXT_ATTACKS["joint"], victim, ANSWERS, "")
    budget = Budget("linf", 2 / 255, 20)
    images, prompts = TEXT_ATTACKS["joint"].build("")(objective, clean, QUESTIONS, budget, generator=seeded())
    joint = objective(prompts)(images)
    alone = objective(TEXT_ATTACKS["characters"].build("")(objective, clean, QUESTIONS, budget, generator=seeded())[1])(
        clean
    )
    image = objective(QUESTIONS)(APGD()(objective(QUESTIONS), clean, budget, generator=seeded()))
    assert joint.mean() < min(float(alone.mean()), float(image.mean()))
