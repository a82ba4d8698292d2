"""Training images: shares, and the effect of a folder of the user's photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from codefend.core import images
from codefend.tasks.training_images import OWN_SHARES, OWN_SIDE, draw_training_images, own_photographs
from codefend.training.bridge import BridgeConfig
from codefend.training.pairs import PairsConfig
from codefend.types import CodefendError


def test_own_photographs_are_read_by_name_and_cut_down(tmp_path: Path) -> None:
    images.save(tmp_path / "b.png", torch.full((3, 2 * OWN_SIDE, OWN_SIDE + 300), 0.25))
    (tmp_path / "inner").mkdir()
    images.save(tmp_path / "inner" / "a.png", torch.full((3, 128, 140), 0.75))
    (tmp_path / "notes.txt").write_text("no image")
    large, small = own_photographs(str(tmp_path))
    assert min(large.shape[1:]) == OWN_SIDE
    assert large.shape[1] / large.shape[2] == pytest.approx(2 * OWN_SIDE / (OWN_SIDE + 300), rel=0.01)
    assert small.shape == (3, 128, 140)
    assert (float(large.mean()), float(small.mean())) == pytest.approx((64 / 255, 191 / 255), abs=1e-3)


@pytest.mark.parametrize("content", ["nothing", "small"])
def test_a_folder_without_usable_photographs_is_an_error(tmp_path: Path, content: str) -> None:
    if content == "small":
        images.save(tmp_path / "small.png", torch.zeros(3, 127, 500))
    with pytest.raises(CodefendError, match="no images" if content == "nothing" else "500 x 127"):
        own_photographs(str(tmp_path))


def test_own_photographs_make_up_their_share_of_the_images() -> None:
    flat = torch.tensor([0.9, 0.1, 0.5])[:, None, None].expand(3, 300, 400)  # no other image is of one colour
    images = draw_training_images(np.random.default_rng(0), 200, first_scene=0, own=(flat,))
    share = (images.flatten(2).std(2).amax(1) < 1e-3).float().mean()
    assert float(share) == pytest.approx(0.75 * OWN_SHARES[1], abs=0.1)


def test_shares_can_be_set() -> None:
    flat = torch.tensor([0.9, 0.1, 0.5])[:, None, None].expand(3, 300, 400)
    images = draw_training_images(np.random.default_rng(0), 60, first_scene=0, own=(flat,), shares=(0, 1, 0))
    share = (images.flatten(2).std(2).amax(1) < 1e-3).float().mean()
    assert float(share) == pytest.approx(0.75, abs=0.15)


def test_runs_older_than_own_photographs_resume() -> None:
    assert not {"photographs", "views", "shares", "shard"} & set(PairsConfig().recorded())
    assert "photographs" not in BridgeConfig().recorded()
    assert PairsConfig(photographs="mine").recorded()["photographs"] == "mine"
