"""Prompt injection."""

from __future__ import annotations

import pytest

from attacks_kit import PromptReader, sample_images
from codefend.attacks import TEXT_ATTACKS
from codefend.attacks.objectives import prompt_objective_for
from codefend.attacks.prompt_injection import INSTRUCTIONS, PlantedInstruction
from codefend.types import Budget, CodefendError


def test_a_sentence_may_contain_braces() -> None:
    objective = prompt_objective_for(TEXT_ATTACKS["planted"], PromptReader(), ["a"], "t")
    prompt = PlantedInstruction(sentence="{x}")(objective, sample_images(1), ["{y}?"], Budget(steps=5))[1][0]
    assert prompt in ["{y}?", *(plant.format(prompt="{y}?", sentence="{x}") for plant in INSTRUCTIONS)]


@pytest.mark.parametrize("plant", ["x {foo}", "{prompt} {", "{}", "{prompt.foo}", "{prompt[a]}", "{sentence:d}"])
def test_a_malformed_template_is_an_error(plant: str) -> None:
    with pytest.raises(CodefendError, match="is not a template"):
        PlantedInstruction(templates=(INSTRUCTIONS[0], plant))
