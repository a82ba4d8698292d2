"""The prior: resumption, loadable weights, a falling loss, and crops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from codefend.core.runs import read_rows
from codefend.purifiers.nets import NetConfig, load_net
from codefend.training import train
from codefend.training.prior import PriorConfig, crops
from codefend.types import CodefendError

if TYPE_CHECKING:
    pass


Interrupt = Callable[[Callable[[], object], int], None]
TINY = NetConfig(channels=(8, 12), blocks=(1, 1), embedding=16)


def prior_config(**changes: object) -> PriorConfig:
    values = {"net": TINY, "steps": 6, "batch": 2, "side": 32, "warmup": 2, "save_every": 2, **changes}
    return PriorConfig(**values)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_net(folder)[0].state_dict()


def test_an_interrupted_prior_equals_an_uninterrupted_one(tmp_path: Path, interrupt: Interrupt) -> None:
    whole = train(prior_config(), tmp_path / "whole")
    interrupt(lambda: train(prior_config(), tmp_path / "cut"), 4)  # of which one in two is saved
    cut = train(prior_config(), tmp_path / "cut")
    assert all(torch.equal(a, weights(cut)[name]) for name, a in weights(whole).items())
    assert [row["step"] for row in read_rows(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


def test_a_prior_cut_short_behind_its_last_checkpoint_has_its_weights(
    tmp_path: Path, interrupt_saved: Callable[..., None]
) -> None:
    whole = train(prior_config(), tmp_path / "whole")
    interrupt_saved(lambda: train(prior_config(), tmp_path / "cut"), 6)
    cut = train(prior_config(), tmp_path / "cut")  # nothing is left to do
    assert all(torch.equal(a, weights(cut)[name]) for name, a in weights(whole).items())
    assert "6 of 6 steps" in (cut / "README.md").read_text()


def test_the_prior_learns(tmp_path: Path) -> None:
    train(prior_config(steps=60, batch=8, lr=4e-3, save_every=60), tmp_path)
    losses = [row["loss"] for row in read_rows(tmp_path)]
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])


def test_a_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    train(prior_config(steps=2), tmp_path)
    with pytest.raises(CodefendError, match="steps"):
        train(prior_config(steps=3), tmp_path)


def test_crops_are_windows_of_their_images() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    windows = crops(images, 4, np.random.default_rng(0))
    for image, window in zip(images, windows, strict=True):
        unfolded = image.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 4, 4)
        assert (unfolded == window).flatten(1).all(1).any()
