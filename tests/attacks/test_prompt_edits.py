"""Attacks by edits of the prompt."""

from __future__ import annotations

from attacks_kit import ANSWERS, QUESTIONS, PromptReader, levenshtein, sample_images, seeded
from codefend.attacks import TEXT_ATTACKS
from codefend.attacks.base import PromptObjective
from codefend.attacks.objectives import prompt_objective_for
from codefend.attacks.prompt_edits import CharacterEdits, GlyphEdits, WordEdits
from codefend.types import Budget


def test_glyph_edits_change_a_few_letters_only() -> None:
    objective = prompt_objective_for(TEXT_ATTACKS["glyphs"], PromptReader(), ANSWERS, "")
    changed = GlyphEdits(edits=2)(objective, sample_images(), QUESTIONS, Budget(steps=30), generator=seeded())[1]
    differing = [sum(a != b for a, b in zip(p, q, strict=True)) for p, q in zip(changed, QUESTIONS, strict=True)]
    assert all(1 <= count <= 2 for count in differing)


def test_searches_stay_within_their_edits_and_improve_with_steps() -> None:
    clean, victim = sample_images(), PromptReader()
    objective: PromptObjective = prompt_objective_for(TEXT_ATTACKS["characters"], victim, ANSWERS, "")
    few, many = (
        CharacterEdits(edits=3)(objective, clean, QUESTIONS, Budget(steps=n), generator=seeded())[1] for n in (2, 60)
    )
    assert all(1 <= levenshtein(p, q) <= 6 for p, q in zip(many, QUESTIONS, strict=True))  # a swap counts twice
    assert objective(many)(clean).mean() < objective(few)(clean).mean()
    one = CharacterEdits(edits=1)(objective, clean, QUESTIONS, Budget(steps=60), generator=seeded())[1]
    assert all(levenshtein(p, q) <= 2 for p, q in zip(one, QUESTIONS, strict=True))
    spoken = WordEdits(edits=1)(objective, clean, QUESTIONS, Budget(steps=30), generator=seeded())[1]
    assert all(abs(len(p.split()) - len(q.split())) <= 1 for p, q in zip(spoken, QUESTIONS, strict=True))


def test_a_prompt_without_letters_is_unchanged() -> None:
    objective = prompt_objective_for(TEXT_ATTACKS["characters"], PromptReader(), ["a"], "")
    assert CharacterEdits()(objective, sample_images(1), ["?! 12"], Budget(steps=5), generator=seeded())[1] == ["?! 12"]
    assert WordEdits()(objective, sample_images(1), [""], Budget(steps=5), generator=seeded())[1] == [""]
