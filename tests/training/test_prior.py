"""The prior: resumption, loadable weights, a falling loss, and crops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from codefend.core.runs import read_rows
from codefend.purifiers.diffpure import vp_sigma
from codefend.purifiers.nets import NetConfig, load_net
from codefend.training import train
from codefend.training.prior import PriorConfig, crops, prior_loss, sample_sigmas
from codefend.types import CodefendError

Interrupt = Callable[[Callable[[], object], int], None]
TINY = NetConfig(channels=(8, 12), blocks=(1, 1), embedding=16)


def prior_config(**changes: object) -> PriorConfig:
    values = {"net": TINY, "steps": 6, "batch": 2, "side": 32, "warmup": 2, "save_every": 2, **changes}
    return PriorConfig(**values)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_net(folder)[0].state_dict()


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_denoiser(x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
    """Exact for pixels that are independently N(0.5, 0.25^2)."""
    skip = (0.0625 / (0.0625 + sigma**2)).view(-1, 1, 1, 1)
    return 0.5 + skip * (x - 0.5)


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


def test_prior_loss_of_the_wiener_gain_is_one_at_every_level() -> None:
    clean = 0.5 + 0.25 * torch.randn(4, 3, 64, 64, generator=gen())
    loss = prior_loss(gaussian_denoiser, clean, torch.tensor([0.01, 0.1, 0.3, 0.6]), generator=gen(1))
    assert loss.shape == (4,)
    assert torch.allclose(loss, torch.ones(4), atol=0.05)


def test_sampled_sigmas_cover_the_purification_range() -> None:
    sigmas = sample_sigmas(4000, generator=gen())
    assert float(sigmas.min()) >= 2e-3
    assert float(sigmas.max()) == pytest.approx(0.65)
    assert float(sigmas.max()) > float(vp_sigma(torch.tensor(0.3)))
    assert float((sigmas > float(vp_sigma(torch.tensor(0.1)))).float().mean()) > 0.2
