"""Mistakes are found before anything is made."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import toys
from codefend.bench.setup import open_bench
from codefend.types import CodefendError
from evaluate_kit import SMALL, run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eps": (8 / 255,)}, "write 8, not"),
        ({"eps": (0.0,)}, "above 0"),
        ({"eps": (math.nan,)}, "above 0 and finite, not nan"),
        ({"eps": (math.inf,), "norm": "l2"}, "above 0 and finite, not inf"),
        ({"attacks": ("apdg",)}, "did you mean 'apgd'"),
        ({"attacks": ("apgd:stepz=3",)}, "stepz"),
        ({"attacks": ("apgd", "word-head")}, "'word-head' cannot attack victim 'toy', which has no space"),
        ({"attacks": ("apgd:steps=many",)}, "whole number"),
        ({"attacks": ("apgd", "apgd")}, "twice"),
        ({"attacks": ("characters:edits=0",)}, "edits of attack 'characters' must be 1 or more, not 0"),
        ({"attacks": ("joint:rounds=0",)}, "rounds and queries of 1 or more, not 0, 40"),
        ({"attacks": ("typographic:size=0",)}, "a share above 0, to 1, not 0"),
        ({"attacks": ("apgd:steps=\u00b2",)}, "must be a whole number of 1 or more"),
        ({"attacks": ("words:edits=-1",)}, "edits of attack 'words' must be 1 or more, not -1"),
        ({"defenses": ("nothing",)}, "unknown purifier"),
        ({"defenses": ()}, "defenses is empty"),
        ({"adaptive": ("jpeg",)}, "not among the defenses"),
        ({"threats": ("T1",)}, "surrogate"),
        ({"tasks": ("riddles",)}, "unknown task"),
        ({"batch": 0}, "batch must be 1 or more"),
    ],
)
def test_mistakes_are_found_before_a_folder_is_made(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CodefendError, match=words):
        run(tmp_path / "run", replace(SMALL, **change))
    assert not (tmp_path / "run").exists()


def test_unusable_victims_and_tasks_are_named() -> None:
    with pytest.raises(CodefendError, match="only answers text"):
        open_bench(SMALL, toys.loaders(toys.BlackBox()))

    def changed(**values: Any) -> Any:
        return replace(toys.loaders(), task=lambda *_: replace(toys.task("questions"), **values))

    same = toys.task("questions", limit=1).examples[0]
    with pytest.raises(CodefendError, match="no examples"):
        open_bench(SMALL, changed(examples=[]))
    with pytest.raises(CodefendError, match="two examples called 'q0'"):
        open_bench(SMALL, changed(examples=[same, same]))
    with pytest.raises(CodefendError, match="no reference answer"):
        open_bench(SMALL, changed(examples=[replace(same, references=())]))
    with pytest.raises(CodefendError, match="needs a target sentence"):
        open_bench(replace(SMALL, attacks=("apgd-targeted",)), changed(target=""))
