"""Views: what they show, that gradients come back, and that a tower through one keeps its encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codefend.encoders.views import SIDES, View, draw_view


def picture() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_view_turns_then_mirrors() -> None:
    images = picture()
    assert torch.equal(View(64)(images), images)
    assert torch.equal(View(64, mirrored=True)(images), images.flip(-1))
    assert torch.equal(View(64, quarters=1, mirrored=True)(images)[..., 0, 0], images[..., -1, -1])
    assert torch.equal(View(64, quarters=2)(images), images.flip((2, 3)))


def test_a_view_at_another_size_keeps_the_mean_and_gives_gradients_back() -> None:
    images = picture().requires_grad_(True)
    shown = View(96, quarters=3)(images)
    assert shown.shape == (2, 3, 96, 96)
    assert shown.mean().item() == pytest.approx(images.mean().item(), abs=0.01)
    (grad,) = torch.autograd.grad(shown.square().sum(), images)
    assert bool((grad != 0).all())


def test_views_are_drawn_from_all_sizes_and_turns() -> None:
    rng = np.random.default_rng(0)
    views = [draw_view(rng) for _ in range(600)]
    assert {view.side for view in views} == set(SIDES)
    assert {(view.quarters, view.mirrored) for view in views} == {(q, m) for q in range(4) for m in (False, True)}
    upright = sum(view.quarters == 0 and not view.mirrored for view in views) / len(views)
    assert upright == pytest.approx(0.5 + 0.5 / 8, abs=0.06)


@pytest.mark.weights
def test_a_tower_through_a_view_sees_that_view() -> None:
    from codefend.training.frozen import ViewedEncoder

    tower, images = ViewedEncoder("lite0"), torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    turned = tower.through(View(160, quarters=1))
    assert turned.encoder is tower.encoder
    assert tower.view == View()
    assert turned.features(images).shape[1] == 25
    wanted = tower.encoder(View(160, quarters=1)(images))
    assert torch.allclose(turned.features(images), wanted)
    assert not torch.allclose(tower.features(images), tower.through(View(128, mirrored=True)).features(images))
