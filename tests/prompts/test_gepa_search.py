"""GEPA's items; whole searches are in tests/training/prompt_search/test_search.py."""

from __future__ import annotations

from pathlib import Path

from codefend.core.runs import open_run
from codefend.prompts import PromptPolicy
from codefend.prompts.answers import AnswerCache
from codefend.prompts.gepa_search import balanced_items
from codefend.prompts.items import Item
from prompts_kit import Suggestible, random_image


def item(number: int, is_right: bool) -> Item:
    return Item(f"{number}", "clean", "clean", "none", "t", random_image(), "q", "x", lambda answer: float(is_right))


def test_gepa_gets_equal_numbers_of_correct_and_wrong_answers(tmp_path: Path) -> None:
    policy, mixed = PromptPolicy("p"), [item(i, i % 5 != 0) for i in range(20)]  # four wrong ones
    with open_run(tmp_path, {}) as run:
        answers = AnswerCache(Suggestible(), run)
        assert {i.id for i in balanced_items(answers, policy, mixed, 20)} == {"0", "5", "10", "15", *"1234"}
        assert {i.id for i in balanced_items(answers, policy, mixed, 5)} == {"0", "1"}
        right = [item(i, True) for i in range(3)]
        assert balanced_items(answers, policy, right, 3) == right
