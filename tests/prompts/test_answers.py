"""Answers of a victim: cached, resumed, retried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codefend.core.runs import open_run
from codefend.prompts import PromptPolicy
from codefend.prompts.answers import AnswerCache
from codefend.prompts.items import Item
from codefend.types import CodefendError
from prompts_kit import random_image


def item(number: int) -> Item:
    return Item(f"{number}", "clean", "clean", "none", "vqa", random_image(), "q?", "yes", lambda answer: 1.0)


class Flaky:
    """Fails ``failures`` times, then answers."""

    name = "flaky"

    def __init__(self, failures: int) -> None:
        self.failures, self.questions = failures, 0

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route")
        self.questions += len(prompts)
        return [f"{prompt} {image.shape[-1]}" for image, prompt in zip(images, prompts, strict=True)]


def test_answers_are_cached_in_the_run_folder(tmp_path: Path) -> None:
    items = [item(i) for i in range(5)]
    wide = Item("wide", "clean", "clean", "none", "vqa", torch.zeros(3, 4, 9), "w", "x", lambda a: 1.0)
    victim = Flaky(1)
    with open_run(tmp_path, {}) as run:
        cache = AnswerCache(victim, run, batch=2, waits=(0.0,))
        answers = cache.answers(PromptPolicy("p", suffix="!"), [*items, wide, items[0]])
        assert answers == ["q?! 8"] * 5 + ["w! 9", "q?! 8"]
        assert victim.questions == 6
        cache.answers(PromptPolicy("renamed", suffix="!"), items)
        assert victim.questions == 6
    with open_run(tmp_path, {}) as run:
        assert AnswerCache(victim, run).answers(PromptPolicy("p", suffix="!"), [*items, wide]) == answers[:6]
        assert victim.questions == 6


def test_a_victim_that_keeps_failing_is_named_and_earlier_answers_are_saved(tmp_path: Path) -> None:
    items, victim = [item(i) for i in range(3)], Flaky(0)
    with open_run(tmp_path, {}) as run:
        AnswerCache(victim, run, batch=1).answers(PromptPolicy("p"), items[:2])
        victim.failures = 99
        with pytest.raises(CodefendError, match=r"'flaky' failed 3 times.*no route.*rerun the command to resume"):
            AnswerCache(victim, run, batch=1, waits=(0.0, 0.0)).answers(PromptPolicy("p"), items)
        victim.failures = 0
        AnswerCache(victim, run, batch=1).answers(PromptPolicy("p"), items)
    assert victim.questions == 3


def test_mistakes_in_code_are_not_retried(tmp_path: Path) -> None:
    class Broken(Flaky):
        def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
            self.questions += 1
            raise TypeError("wrong argument")

    victim = Broken(0)
    with open_run(tmp_path, {}) as run, pytest.raises(TypeError):
        AnswerCache(victim, run).answers(PromptPolicy("p"), [item(0)])
    assert victim.questions == 1


def test_too_few_answers_are_an_error(tmp_path: Path) -> None:
    class Short(Flaky):
        def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
            return []

    with open_run(tmp_path, {}) as run, pytest.raises(CodefendError, match="gave 0 answers to 1 questions"):
        AnswerCache(Short(0), run).answers(PromptPolicy("p"), [item(0)])
