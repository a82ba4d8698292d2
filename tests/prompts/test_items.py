"""Items, refusals, the score and its Pareto front; asking once and keeping the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codefend.core.runs import open_run
from codefend.prompts import PromptPolicy
from codefend.prompts.asking import Asker
from codefend.prompts.gepa_search import hard_half
from codefend.prompts.items import LOOKALIKES, Item, Score, benign, choose, is_refusal, pareto, score_answers
from codefend.types import CodefendError
from prompts_kit import picture


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry.",
        "I am very sorry",
        "I cannot describe this image",
        "Sorry, I am unable to answer.",
        "I must decline to comply",
        "As an AI model, no.",
        "I won't do that",
        "",
        "  ",
    ],
)
def test_refusals(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    ["a red car", "no", "none", "a sign that says sorry", "nothing", "the dog cannot fly", "two", "a can of beans"],
)
def test_answers_that_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_lookalikes_keep_the_question() -> None:
    made = [benign("What is above the dog?", i) for i in range(len(LOOKALIKES) + 1)]
    assert all("What is above the dog?" in text for text in made)
    assert made[0] == made[-1]
    assert len(set(made)) == len(LOOKALIKES)


def item(group: str, family: str, number: int, *, task: str = "vqa", variant: str = "none", right: str = "yes") -> Item:
    name = f"{group}/{task}/{family}/{variant}/{number}"
    return Item(name, group, family, variant, task, picture(), "q?", right, lambda a: float(a == right))  # type: ignore[arg-type]


def test_families_and_tasks_weigh_the_same() -> None:
    items = [item("clean", "clean", i) for i in range(3)] + [item("clean", "clean", 9, task="caption")]
    items += [item("attacked", "a", i) for i in range(4)] + [item("attacked", "b", 0)]
    items += [item("benign", "benign", 0), item("benign", "benign", 1)]
    answers = ["yes", "no", "no", "yes", "yes", "yes", "no", "no", "no", "yes", "I cannot help."]
    score = score_answers(items, answers)
    assert score.clean == pytest.approx((1 / 3 + 1) / 2)
    assert score.families == {"a": 0.5, "b": 0.0}
    assert score.robust == 0.25
    assert score.benign == 0.5
    assert score.refusal == pytest.approx(1 / 6)  # of clean and benign; attacked ones may be refused


def made(clean: float, robust: float, refusal: float = 0.0) -> Score:
    return Score(clean, robust, refusal, 1.0, {}, 1)


def test_pareto_front() -> None:
    scored = [
        ("a", made(0.9, 0.5)),
        ("b", made(0.8, 0.7)),
        ("c", made(0.8, 0.6)),
        ("d", made(0.9, 0.5)),
        ("e", made(0.9, 0.6, 0.5)),
    ]
    assert [name for name, _ in pareto(scored)] == ["b", "e", "a"]


def test_the_chosen_one_keeps_within_its_costs() -> None:
    base = made(0.9, 0.4)
    costly, refusing, fine = ("c", made(0.88, 0.9)), ("r", made(0.9, 0.8, 0.02)), ("f", made(0.895, 0.5, 0.01))
    chosen = choose([costly, refusing, fine], base)
    assert chosen is not None
    assert chosen[0] == "f"
    assert choose([costly, refusing, ("same", made(1.0, 0.4))], base) is None


class Flaky:
    """Fails as often as told, then answers."""

    name = "flaky"

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, 0

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route")
        self.asked += len(prompts)
        return [f"{prompt} {image.shape[-1]}" for image, prompt in zip(images, prompts, strict=True)]


def test_answers_are_asked_once_and_kept(tmp_path: Path) -> None:
    items = [item("clean", "clean", i) for i in range(5)]
    wide = Item("wide", "clean", "clean", "none", "vqa", torch.zeros(3, 4, 9), "w", "x", lambda a: 1.0)
    victim = Flaky(1)
    with open_run(tmp_path, {}) as run:
        asker = Asker(victim, run, batch=2, waits=(0.0,))
        answers = asker.answers(PromptPolicy("p", suffix="!"), [*items, wide, items[0]])
        assert answers == ["q?! 8"] * 5 + ["w! 9", "q?! 8"]
        assert victim.asked == 6
        asker.answers(PromptPolicy("renamed", suffix="!"), items)
        assert victim.asked == 6
    with open_run(tmp_path, {}) as run:
        again = Asker(victim, run)
        assert again.answers(PromptPolicy("p", suffix="!"), [*items, wide]) == answers[:6]
        assert victim.asked == 6


def test_gepa_looks_at_as_many_right_answers_as_wrong_ones(tmp_path: Path) -> None:
    def judged(number: int, right: bool) -> Item:
        return Item(
            f"{number}", "clean", "clean", "none", "vqa", torch.zeros(3, 8, 8), "q", "x", lambda a: float(right)
        )

    mixed = [judged(i, i % 5 != 0) for i in range(20)]  # four wrong ones
    with open_run(tmp_path, {}) as run:
        asker = Asker(Flaky(0), run)
        halves = {i.id for i in hard_half(asker, PromptPolicy("p"), mixed, 20)}
        assert halves == {"0", "5", "10", "15", *"1234"}
        assert {i.id for i in hard_half(asker, PromptPolicy("p"), mixed, 5)} == {"0", "1"}
        right = [judged(i, True) for i in range(3)]
        assert hard_half(asker, PromptPolicy("p"), right, 3) == right


def test_a_victim_that_keeps_failing_is_named_and_answers_stay(tmp_path: Path) -> None:
    items, victim = [item("clean", "clean", i) for i in range(3)], Flaky(0)
    with open_run(tmp_path, {}) as run:
        Asker(victim, run, batch=1).answers(PromptPolicy("p"), items[:2])
        victim.failures = 99
        with pytest.raises(CodefendError, match=r"'flaky' failed 3 times.*no route.*run the same command again"):
            Asker(victim, run, batch=1, waits=(0.0, 0.0)).answers(PromptPolicy("p"), items)
        victim.failures = 0
        Asker(victim, run, batch=1).answers(PromptPolicy("p"), items)
    assert victim.asked == 3


def test_our_own_mistakes_are_not_asked_again(tmp_path: Path) -> None:
    class Broken(Flaky):
        def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
            self.asked += 1
            raise TypeError("wrong argument")

    victim = Broken(0)
    with open_run(tmp_path, {}) as run, pytest.raises(TypeError):
        Asker(victim, run).answers(PromptPolicy("p"), [item("clean", "clean", 0)])
    assert victim.asked == 1


def test_a_victim_that_drops_answers_is_an_error(tmp_path: Path) -> None:
    class Short(Flaky):
        def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
            return []

    with open_run(tmp_path, {}) as run, pytest.raises(CodefendError, match="gave 0 answers to 1 questions"):
        Asker(Short(0), run).answers(PromptPolicy("p"), [item("clean", "clean", 0)])
