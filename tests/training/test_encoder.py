"""Distillation of encoders: a falling loss, resumption, the cache of the teacher's maps, and early errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codefend import encoders
from codefend.core.runs import read_rows
from codefend.tasks.natural_images import NaturalConfig
from codefend.training import encoder as encoder_training
from codefend.training import train
from codefend.training.encoder import EncoderConfig, TeacherBatches
from codefend.types import CodefendError

Interrupt = Callable[[Callable[[], object], int], None]


class Teacher(torch.nn.Module):
    """Two fixed random convolutions with the strides of the real teacher."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.middle, self.last = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Conv2d(3, 6, 32, 32)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.middle(images), self.last(images)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderConfig:
    monkeypatch.setattr(encoder_training, "EfficientNetLite", Teacher)
    natural = NaturalConfig(shares=(0, 1, 0))
    cache = str(tmp_path / "maps.safetensors")
    return EncoderConfig(
        family="convnet", width=64, depth=1, images=40, side=64, steps=30, batch=8, warmup=3, save_every=15,
        natural=natural, cache=cache,
    )  # fmt: skip


def test_a_student_learns_and_an_interrupted_training_equals_an_uninterrupted_one(
    config: EncoderConfig, tmp_path: Path, interrupt: Interrupt
) -> None:
    whole = train(config, tmp_path / "whole")
    losses = [row["middle"] + row["last"] for row in read_rows(tmp_path / "whole")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    interrupt(lambda: train(config, tmp_path / "cut"), 18)
    cut = train(config, tmp_path / "cut")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(encoders.load(str(cut))(images), encoders.load(str(whole))(images))
    assert "30 of 30 steps" in (whole / "README.md").read_text()


def test_the_teachers_maps_are_drawn_once_for_several_students(
    config: EncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TeacherBatches(config)(3)
    monkeypatch.setattr(encoder_training, "EfficientNetLite", None)  # cannot be called
    again = TeacherBatches(config)(3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.images.shape == (8, 3, 64, 64)
    assert first.middle.shape == (8, 8, 4, 4)
    assert first.last.shape == (8, 6, 2, 2)


def test_an_unknown_family_fails_before_the_run_folder_exists(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="unknown encoder family"):
        train(EncoderConfig(family="mamba"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
