"""The first stage of `benchmarks/answers.py`: words that an attack turns vision tokens away from, on any white box."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attacks_kit import ToyVictim
from codefend.attacks.norms import random_start
from codefend.core.seeds import make_generator
from codefend.types import Budget

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Wordless:
    """The toy victim without word scores of its own; the embeddings of words are the same."""

    name = "wordless"

    def __init__(self) -> None:
        toy = ToyVictim()
        self.features, self.loss, self.generate = toy.features, toy.loss, toy.generate

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.sin(torch.arange(12) * (len(text) + 1.0))[None] for text in texts]


def test_a_victim_without_word_scores_is_attacked_by_its_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    answers = import_module("answers")
    clean = torch.rand(2, 3, 16, 16, generator=make_generator(0, "clean"))
    budget = Budget(eps=8 / 255, steps=6)
    start = random_start(clean, budget, generator=make_generator(0, "start"))
    wordless, toy = Wordless(), ToyVictim()
    objective = answers.word_objective(wordless, wordless, clean)
    torch.testing.assert_close(objective(start), answers.word_objective(toy, toy, clean)(start))
    assert bool((objective(answers.descend(objective, start, clean, budget)) < objective(start)).all())
