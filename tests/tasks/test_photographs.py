"""The photographs task: crops from the seed, of held-out photographs or of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from codefend.core.assets import asset
from codefend.core.images import save
from codefend.tasks import load
from codefend.tasks.photographs import load_photographs
from codefend.tasks.scenes import PHOTOGRAPHS
from codefend.tasks.training_images import HELD_OUT
from codefend.types import CodefendError

GUIDES = ("lite0", "lite2")  # encoders that guided the shipped bridge; lite1 is unseen


def test_crops_are_8_bit_windows_from_the_seed() -> None:
    examples = load_photographs(limit=8, side=64).examples
    assert [example.kind for example in examples] == list(HELD_OUT) * 2
    assert examples[5].id == f"{HELD_OUT[1]}-1"
    assert [example.source for example in examples] == list(HELD_OUT) * 2
    image = examples[1].image
    assert image.shape == (3, 64, 64)
    assert torch.allclose(image * 255, (image * 255).round(), atol=1e-4)
    assert float(image.std()) > 0.05
    again, other = (load_photographs(limit=2, side=64, seed=seed).examples[1].image for seed in (0, 1))
    assert torch.equal(image, again)
    assert not torch.equal(image, other)


def test_without_a_limit_there_are_eight_crops_of_each() -> None:
    task = load("photographs", side=32)
    assert len(task.examples) == 8 * len(HELD_OUT)


def test_held_out_photographs_are_not_used_in_training() -> None:
    """Scenes and trainings take scikit-image's photographs by these names; scikit-learn's two are others."""
    assert not set(PHOTOGRAPHS) & set(HELD_OUT)


def test_the_shipped_bridges_were_guided_by_two_encoders_of_that_family() -> None:
    record = json.loads((asset("weights/bridge-detail") / "training.json").read_text())
    banks = [name for bank in record["pairs"] for name in bank["config"]["encoders"]]
    assert {*record["config"]["encoders"], *banks} == set(GUIDES)
    assert set(json.loads((asset("weights/bridge") / "training.json").read_text())["config"]["encoders"]) == set(GUIDES)


def test_own_photographs_are_named_by_their_path(tmp_path: Path) -> None:
    for name, level in (("b.png", 0.2), ("deep/a.png", 0.8)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, torch.full((3, 130, 140), level))
    examples = load("photographs", limit=4, side=64, folder=str(tmp_path)).examples
    assert [example.id for example in examples] == ["b.png-0", "deep/a.png-0", "b.png-1", "deep/a.png-1"]
    assert float(examples[3].image.mean()) == pytest.approx(0.8, abs=0.01)
    with pytest.raises(CodefendError, match="test split only"):
        load("photographs", split="val")
