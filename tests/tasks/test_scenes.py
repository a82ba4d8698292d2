"""Scenes: a function of the seed, disjoint in object pairs, with correct captions and answers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

import codefend
from codefend.tasks import language
from codefend.tasks.objects import BY_NAME, COLOURS, THINGS, group, sprites, tint
from codefend.tasks.scene_tasks import describe
from codefend.tasks.scenes import SIZE, Scene, compose
from codefend.types import CodefendError


def many(split: str, count: int = 300) -> list[Scene]:
    return [compose(split, seed) for seed in range(count)]


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return many("train")


@pytest.fixture(scope="module")
def test() -> list[Scene]:
    return many("test")


def pairs_of(scenes: list[Scene]) -> set[frozenset[str]]:
    return {frozenset(p) for s in scenes for p in combinations([o.thing.name for o in s.objects], 2)}


def test_a_scene_is_a_function_of_split_and_seed() -> None:
    assert torch.equal(compose("train", 7).image, compose("train", 7).image)
    assert not torch.equal(compose("train", 7).image, compose("val", 7).image)
    assert not torch.equal(compose("train", 7).image, compose("train", 8).image)


def test_images_keep_the_contract(train: list[Scene]) -> None:
    for scene in train[:50]:
        assert scene.image.shape == (3, SIZE, SIZE)
        assert scene.image.dtype == torch.float32
        assert 0 <= scene.image.min() <= scene.image.max() <= 1


def test_no_pair_of_objects_is_in_both_splits(train: list[Scene], test: list[Scene]) -> None:
    assert len(pairs_of(train)) > 200
    assert len(pairs_of(test)) > 100
    assert not pairs_of(train) & pairs_of(test)
    same = [(a, b) for a, b in combinations(range(len(THINGS)), 2) if group(a) == group(b)]
    assert all(group(BY_NAME[a]) == group(BY_NAME[b]) for a, b in map(tuple, pairs_of(test)))
    assert len(same) == 224  # 8 groups of 8


def test_objects_lie_inside_their_place(train: list[Scene]) -> None:
    for scene in train:
        for o in scene.objects:
            middle = (o.left + o.size / 2, o.top + o.size / 2)
            assert 0 <= o.left <= o.left + o.size <= SIZE
            assert 0 <= o.top <= o.top + o.size <= SIZE
            if o.place != "center":
                assert (middle[0] > SIZE / 2) == ("right" in o.place)
                assert (middle[1] > SIZE / 2) == ("bottom" in o.place)


def test_every_count_and_every_object_appears(train: list[Scene]) -> None:
    assert {len(s.objects) for s in train} == {1, 2, 3, 4}
    assert {o.thing.name for s in many("train", 600) for o in s.objects} == set(BY_NAME)


@pytest.mark.parametrize("name", list(COLOURS))
def test_a_tinted_drawing_has_its_colour(name: str) -> None:
    drawing = sprites("fluent")[BY_NAME["car"]]
    rgba = tint(drawing, COLOURS[name])
    solid = rgba[3] > 0.9
    red, green, blue = rgba[:3, solid].mean(1)
    strongest = {
        "red": red > 1.5 * max(green, blue),
        "yellow": min(red, green) > 1.3 * blue,
        "green": green > 1.5 * max(red, blue),
        "blue": blue > 1.3 * max(red, green),
        "purple": min(red, blue) > 1.3 * green,
    }
    assert strongest[name]
    assert torch.equal(rgba[3], drawing[3])


def questions(scenes: list[Scene], kind: str) -> list[tuple[Scene, language.Dialogue]]:
    rng = np.random.default_rng(0)
    pairs = [(s, language.ask(s, kind, rng)) for s in scenes]
    return [(s, d) for s, d in pairs if d is not None]


def test_existence_is_balanced_true_and_hard() -> None:
    pairs = questions(many("train", 800), "existence")
    yes = [d.answer == "yes" for _, d in pairs]
    assert 0.44 < np.mean(yes) < 0.56
    hard = 0
    for scene, dialogue in pairs:
        phrases = {o.phrase for o in scene.objects} | {o.thing.name for o in scene.objects}
        named = next(p for p in sorted(_all_phrases(), key=len, reverse=True) if f" {p} " in dialogue.question)
        assert (named in phrases) == (dialogue.answer == "yes"), dialogue
        if dialogue.answer == "no":
            thing = THINGS[BY_NAME[named.split(" ")[-1]]]
            hard += any(o.thing.category == thing.category for o in scene.objects)
    assert hard > 0.4 * (len(yes) - sum(yes))


def _all_phrases() -> list[str]:
    return [t.name for t in THINGS] + [f"{c} {t.name}" for t in THINGS if t.tinted for c in COLOURS]


def test_relations_follow_the_pixels(train: list[Scene]) -> None:
    for scene, dialogue in questions(train, "relation"):
        middle = {o.thing.name: (o.left + o.size / 2, o.top + o.size / 2) for o in scene.objects}
        names = [n for n in middle if f"the {n}" in dialogue.question]
        way = next(w for w in ("left of", "right of", "above", "below") if w in dialogue.question)
        if dialogue.answer in ("yes", "no"):
            names.sort(key=dialogue.question.index)
            first, second = (middle[n] for n in names)
        else:
            first, second = middle[dialogue.answer], middle[names[0]]
        holds = {"left of": first[0] < second[0], "right of": first[0] > second[0]}
        holds |= {"above": first[1] < second[1], "below": first[1] > second[1]}
        assert holds[way] == (dialogue.answer != "no"), dialogue


def test_counts_positions_colours_and_objects_are_right(train: list[Scene]) -> None:
    for scene, d in questions(train, "count"):
        expected = len(scene.objects)
        for category, word in language.CATEGORIES.items():
            if word in d.question:
                expected = sum(o.thing.category == category for o in scene.objects)
        assert d.answer == language.NUMBERS[expected]
    for scene, d in questions(train, "position"):
        assert any(o.place == d.answer and o.thing.name in d.question for o in scene.objects)
    for scene, d in questions(train, "colour"):
        assert any(o.colour == d.answer and o.thing.name in d.question for o in scene.objects)
    for scene, d in questions(train, "object"):
        assert any(o.thing.name == d.answer and o.place in d.question for o in scene.objects)


def test_captions_name_every_object(train: list[Scene]) -> None:
    for scene in train:
        texts = language.captions(scene)
        assert len(texts) >= 3
        assert all(o.phrase in text for o in scene.objects for text in texts)


@pytest.mark.parametrize(
    ("name", "count"), [("caption", 512), ("vqa", 512), ("caption-shift", 256), ("vqa-shift", 256)]
)
def test_the_frozen_sets_are_in_the_package(name: str, count: int) -> None:
    task = codefend.load_task(name)
    assert len(task.examples) == count
    assert len({e.id for e in task.examples}) == count
    assert all(e.image.shape == (3, SIZE, SIZE) and e.references and e.prompt for e in task.examples)
    assert task.headline in task.metrics
    perfect = task.metrics[task.headline]([e.references[0] for e in task.examples], task.examples)
    assert perfect.min() == 1


def test_frozen_questions_cover_every_kind() -> None:
    kinds = [e.kind for e in codefend.load_task("vqa").examples]
    assert all(kinds.count(kind) >= 50 for kind in language.KINDS)


def test_the_frozen_set_is_what_the_generator_draws() -> None:
    from codefend.tasks.scenes import load_photographs

    shipped = codefend.load_task("caption", limit=3).examples
    for number, example in enumerate(shipped):
        drawn = describe(compose("test", number, photographs=load_photographs()), "test", number)["caption"]
        assert drawn.references == example.references
        assert (drawn.image - example.image).abs().max() < 2 / 255  # another Pillow or torch may round otherwise


def test_wrong_names_and_limits_are_errors() -> None:
    with pytest.raises(CodefendError, match="did you mean 'caption'"):
        codefend.load_task("captoin")
    with pytest.raises(CodefendError, match="test, val, train"):
        codefend.load_task("vqa", split="dev")
    with pytest.raises(CodefendError, match="1 or more"):
        codefend.load_task("vqa", limit=0)
