from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from codefend.core import images
from codefend.tasks import easyvqa
from codefend.tasks.easyvqa import load_easyvqa
from codefend.types import CodefendError

installed = pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="easy-vqa isn't installed")


@installed
def test_the_test_split_is_whole() -> None:
    task = load_easyvqa("test")
    assert len(task.examples) == 9673
    assert len(load_easyvqa("train").examples) == 38575
    first = task.examples[0]
    assert (first.id, first.prompt) == ("test-0", "what is the red shape?")
    assert first.references == ("triangle",)
    assert first.image.shape == (3, 128, 128)
    assert task.metrics[task.headline](["Triangle."], [first]).tolist() == [1.0]
    assert "easy_vqa" not in sys.modules  # located, never imported


@installed
def test_kinds_group_the_thirteen_answers() -> None:
    examples = load_easyvqa("test", limit=300, size=None).examples
    assert isinstance(examples, easyvqa.LazyExamples)
    kinds = {(r.kind, r.references[0]) for r in examples.records}
    assert {answer for kind, answer in kinds if kind == "existence"} == {"yes", "no"}
    assert {answer for kind, answer in kinds if kind == "shape"} == {"circle", "rectangle", "triangle"}
    assert len({answer for kind, answer in kinds if kind == "colour"}) == 8
    assert min(Counter(r.kind for r in examples.records).values()) > 20


@installed
def test_a_limit_takes_the_same_questions_every_time() -> None:
    ids = [e.id for e in load_easyvqa("test", limit=5).examples]
    assert ids == [e.id for e in load_easyvqa("test", limit=5).examples]
    assert set(ids) < {e.id for e in load_easyvqa("test", limit=40, size=None).examples}


@installed
def test_size_scales_the_images_up() -> None:
    small = load_easyvqa("test", limit=1, size=None).examples[0].image
    large = load_easyvqa("test", limit=1).examples[0].image
    assert small.shape == (3, 64, 64)
    assert torch.equal(large, images.quantize8(large))
    averaged = torch.nn.functional.avg_pool2d(large[None], 2)[0]
    assert (averaged - small).abs().mean() < 0.01


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(CodefendError, match="no split 'val'; known: train, test"):
        load_easyvqa("val")


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CodefendError, match=r"pip install easy-vqa==1\.0"):
        load_easyvqa()


def test_a_damaged_package_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(easyvqa, "_data_folder", lambda: tmp_path)
    with pytest.raises(CodefendError, match="damaged"):
        load_easyvqa()
