"""Photograph tasks: labels by hand or by the encoder, references with articles, questions of both kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codefend import load_task
from codefend.tasks import photographs
from codefend.types import CodefendError, Example

pytest.importorskip("skimage")


def test_captions_name_one_of_the_labels() -> None:
    task = load_task("photo-caption", limit=4)
    assert [e.id for e in task.examples] == ["chelsea-0-c", "coffee-0-c", "rocket-0-c", "chelsea-1-c"]
    assert task.examples[1].references == ("a photo of an espresso", "a photo of a cup", "a photo of a coffee mug")
    answers = ["a photo of a tabby", "a cup of tea", "a photo", "a photo of an Egyptian cat"]
    assert task.metrics[task.headline](answers, task.examples).tolist() == [1, 1, 0, 1]


def test_questions_ask_for_the_class_and_whether_one_is_there() -> None:
    examples = load_task("photo-vqa").examples
    assert len(examples) == 8 * len(photographs.LABELS)
    assert {e.kind for e in examples} == {"object", "existence"}
    by_answer = {answer: [e for e in examples if e.references == (answer,)] for answer in ("yes", "no")}
    assert len(by_answer["yes"]) == len(by_answer["no"]) == 6
    for example in by_answer["no"]:
        name = example.id.split("-")[0]
        assert not any(label in example.prompt for label in photographs.LABELS[name])


def test_crops_are_the_same_on_each_load() -> None:
    first, second = (load_task("photo-vqa", limit=3).examples for _ in range(2))
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, second, strict=True))


@pytest.mark.weights
def test_in_a_folder_the_encoder_gives_the_labels(tmp_path: Path) -> None:
    from skimage import data

    Image.fromarray(data.coffee()).save(tmp_path / "coffee.png")
    Image.fromarray(np.full((200, 200, 3), 120, np.uint8)).save(tmp_path / "grey.png")
    task = load_task("photo-caption", limit=3, folder=str(tmp_path))
    assert 0 < len(task.examples) <= 3
    assert all(e.id.startswith("coffee.png-") and len(e.tags) == 1 for e in task.examples)


@pytest.mark.weights
def test_a_folder_without_any_class_is_an_error(tmp_path: Path) -> None:
    Image.fromarray(np.full((200, 200, 3), 120, np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(CodefendError, match="shows an ImageNet class"):
        load_task("photo-vqa", limit=2, folder=str(tmp_path))


def test_another_split_is_an_error() -> None:
    with pytest.raises(CodefendError, match="test split only"):
        load_task("photo-caption", split="train")


def test_articles() -> None:
    assert photographs.caption("espresso") == "a photo of an espresso"
    assert photographs.caption("") == "a photo"
    example = Example("1", torch.zeros(3, 4, 4), "", (), tags=("espresso",))
    assert photographs.names_class(["a photo"], [example]).tolist() == [0]
