"""Attacks on the prompt, on text in the picture, and on both at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attacks_kit import ANSWERS, Dim, ToyVictim, pictures
from codefend.attacks import TEXT_ATTACKS, TextAttackSpec, prompt_objective_for
from codefend.attacks.apgd import APGD
from codefend.attacks.base import PromptObjective
from codefend.attacks.bitmap_font import render
from codefend.attacks.norms import distance
from codefend.attacks.prompt_edits import CharacterEdits, GlyphEdits, WordEdits
from codefend.attacks.prompt_injection import INSTRUCTIONS, PlantedInstruction
from codefend.attacks.trace import Trace
from codefend.attacks.typographic import TypographicAttack, write_text
from codefend.core.text_edits import Edit, lookalikes, rewordings, rewrite, typos
from codefend.defense import DefendedVictim, Defense
from codefend.types import Budget, CodefendError, Objective

QUESTIONS = ["What is left of the picture?", "Describe the image.", "How many red objects are there?"]
BUDGET = Budget("linf", 8 / 255, 12)

every_attack = pytest.mark.parametrize("spec", TEXT_ATTACKS.values(), ids=lambda spec: spec.name)


class Reader(ToyVictim):
    """Its logits shift with every character of the prompt and its place."""

    def logits(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        shift = torch.tensor([[sum(ord(c) * (i + 1) for i, c in enumerate(p)) % 97 / 97.0] for p in prompts])
        return torch.tanh(self.features(images).mean(1) * 4 + shift) @ self.head.to(images)


class BlackBox:
    """Answers only, and repeats what it is asked to say."""

    name = "box"

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return [p.rpartition("say exactly: ")[2].split("\n")[0] if "say exactly" in p else "a cat" for p in prompts]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


# The contract


@every_attack
@pytest.mark.parametrize("defended", [False, True])
def test_contract(spec: TextAttackSpec, defended: bool) -> None:
    clean, victim = pictures(), Reader()
    shown = DefendedVictim(victim, Defense(purifier=Dim(), name="dim")) if defended else victim
    objective = prompt_objective_for(spec, shown, ANSWERS, "target")
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

    images, prompts = spec.build("")(objective, pictures(), QUESTIONS, Budget(steps=3), generator=seeded())
    assert torch.equal(images, pictures())
    assert prompts == QUESTIONS


@every_attack
def test_trace_hears_the_looks(spec: TextAttackSpec) -> None:
    trace, attack = Trace(), spec.build("target")
    assert trace.attach(attack)
    attack(prompt_objective_for(spec, Reader(), ANSWERS, "target"), pictures(), QUESTIONS, BUDGET, generator=seeded())
    assert trace.losses
    assert all(losses.shape == (3,) for losses in trace.losses)
    assert bool(trace.gradient_norms) == (spec.threat == "white-box")


@every_attack
def test_spec_is_filled_in(spec: TextAttackSpec) -> None:
    assert TEXT_ATTACKS[spec.name] is spec
    assert spec.build("x").name == spec.name
    assert spec.summary
    assert "\n" not in spec.summary
    assert spec.source
    assert spec.steps > 0


def test_black_boxes_are_asked_for_answers_and_spared_gradients() -> None:
    clean = pictures()
    images, prompts = PlantedInstruction(sentence="a dog")(
        prompt_objective_for(TEXT_ATTACKS["planted"], BlackBox(), ANSWERS, "a dog"), clean, QUESTIONS, Budget(steps=5)
    )
    assert BlackBox().generate(images, prompts) == ["a dog"] * 3
    with pytest.raises(CodefendError, match="only answers text"):
        prompt_objective_for(TEXT_ATTACKS["joint"], BlackBox(), ANSWERS, "")
    with pytest.raises(CodefendError, match="sentence"):
        prompt_objective_for(TEXT_ATTACKS["planted"], BlackBox(), ANSWERS, "")


# Edits


def test_rewrite_makes_edits_from_the_right() -> None:
    edits = [Edit(0, 2, ("b", "a")), Edit(3, 1, ()), Edit(4, 1, ("e", "x"))]
    assert rewrite("abcde", edits) == [*"bac", "e", "x"]
    assert not Edit(0, 2, ()).apart(Edit(1, 1, ()))
    assert Edit(0, 1, ()).apart(Edit(1, 1, ()))
    assert not Edit(1, 1, ()).apart(Edit(1, 1, ("x",)))


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=12))
def test_a_typo_is_one_edit(text: str) -> None:
    for edit in typos(list(text)):
        changed = "".join(rewrite(list(text), [edit]))
        assert changed != text
        assert levenshtein(changed, text) <= (2 if edit.length == 2 else 1)


def test_lookalikes_change_letters_that_still_read_the_same() -> None:
    word = "Is a7?"
    menu = ["".join(rewrite(list(word), [edit])) for edit in lookalikes(list(word))]
    assert {"Ís a7?", "Is á7?", "Is а7?"} <= set(menu)  # the last: a Cyrillic a
    assert len(menu) == len(set(menu)) > 20
    assert all(len(m) == len(word) and m[2] == " " and m.endswith("7?") for m in menu)
    assert all(sum(a != b for a, b in zip(m, word, strict=True)) == 1 for m in menu)


def test_glyphs_changes_letters_only_and_a_few_at_most() -> None:
    objective = prompt_objective_for(TEXT_ATTACKS["glyphs"], Reader(), ANSWERS, "")
    changed = GlyphEdits(edits=2)(objective, pictures(), QUESTIONS, Budget(steps=30), generator=seeded())[1]
    differing = [sum(a != b for a, b in zip(p, q, strict=True)) for p, q in zip(changed, QUESTIONS, strict=True)]
    assert all(1 <= count <= 2 for count in differing)


def test_rewordings_keep_most_words() -> None:
    words = ["How", "many", "red", "objects", "are", "there?"]
    menu = [" ".join(rewrite(words, [edit])) for edit in rewordings(words)]
    assert "How many red things are there?" in menu
    assert "How many objects red are there?" in menu
    assert "How many red objects there?" in menu
    assert all(sum(w in m for w in ("many", "red")) == 2 or "numerous" in m for m in menu)


def test_searches_stay_in_their_edits_and_get_better_with_looks() -> None:
    clean, victim = pictures(), Reader()
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


def test_a_prompt_without_letters_is_left_alone() -> None:
    objective = prompt_objective_for(TEXT_ATTACKS["characters"], Reader(), ["a"], "")
    assert CharacterEdits()(objective, pictures(1), ["?! 12"], Budget(steps=5), generator=seeded())[1] == ["?! 12"]
    assert WordEdits()(objective, pictures(1), [""], Budget(steps=5), generator=seeded())[1] == [""]


def test_a_planted_sentence_may_hold_braces() -> None:
    objective = prompt_objective_for(TEXT_ATTACKS["planted"], Reader(), ["a"], "t")
    prompt = PlantedInstruction(sentence="{x}")(objective, pictures(1), ["{y}?"], Budget(steps=5))[1][0]
    assert prompt in ["{y}?", *(plant.format(prompt="{y}?", sentence="{x}") for plant in INSTRUCTIONS)]


@pytest.mark.parametrize("plant", ["x {foo}", "{prompt} {", "{}", "{prompt.foo}", "{prompt[a]}", "{sentence:d}"])
def test_a_plant_that_is_no_template_is_told(plant: str) -> None:
    with pytest.raises(CodefendError, match="is not a template"):
        PlantedInstruction(templates=(INSTRUCTIONS[0], plant))


def test_joint_beats_each_half() -> None:
    clean, victim = pictures(), Reader()
    objective = prompt_objective_for(TEXT_ATTACKS["joint"], victim, ANSWERS, "")
    budget = Budget("linf", 2 / 255, 20)
    images, prompts = TEXT_ATTACKS["joint"].build("")(objective, clean, QUESTIONS, budget, generator=seeded())
    joint = objective(prompts)(images)
    alone = objective(TEXT_ATTACKS["characters"].build("")(objective, clean, QUESTIONS, budget, generator=seeded())[1])(
        clean
    )
    image = objective(QUESTIONS)(APGD()(objective(QUESTIONS), clean, budget, generator=seeded()))
    assert joint.mean() < min(float(alone.mean()), float(image.mean()))


# Text in the picture


def test_letters_are_drawn_dot_by_dot() -> None:
    art = ["".join(" #"[int(dot)] for dot in row[1:6]) for row in render("t", 9)[1:8].tolist()]
    assert art == ["#####"] + ["  #  "] * 6
    assert render("ab cd", 2).shape == (17, 13)  # two lines of two
    assert render("~", 3).sum() == 0


def test_written_strip_covers_only_its_rows() -> None:
    images = pictures(2, 64)
    top = write_text(images, "stop", size=0.2, place=0.0)
    assert torch.equal(top[:, :, 18:], images[:, :, 18:])
    assert set(top[:, :, :9].unique().tolist()) == {0.0, 1.0}
    inverse = write_text(images, "stop", size=0.2, place=0.0, ink=0.0)
    assert torch.equal(inverse[:, :, :9], 1 - top[:, :, :9])
    assert torch.equal(write_text(images, "stop", size=0.2)[:, :, :40], images[:, :, :40])


def test_long_text_is_cut_at_the_edge_of_a_tiny_picture() -> None:
    assert write_text(pictures(1, 9), "a very long sentence", size=1.0).shape == (1, 3, 9, 9)


def test_typographic_takes_the_best_place_for_each_picture() -> None:
    images = torch.full((2, 3, 32, 32), 0.5)

    def objective(prompts: Sequence[str]) -> Objective:
        # A light bottom pays for the first picture, a light top for the second.
        return lambda x: -torch.stack([x[0, :, 23:].mean(), x[1, :, :9].mean()])

    written, prompts = TypographicAttack(sentence="hi")(objective, images, QUESTIONS[:2], Budget(), generator=seeded())
    assert prompts == QUESTIONS[:2]
    assert (written[0] != images[0]).any(0)[23:].all()
    assert (written[1] != images[1]).any(0)[:9].all()
    assert torch.equal(written[0, :, :23], images[0, :, :23])
