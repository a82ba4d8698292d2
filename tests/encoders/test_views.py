"""Views: their geometry, that gradients come back, and encoders behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from codefend.encoders.views import SIDES, View, draw_view


def example_images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_view_turns_then_mirrors() -> None:
    images = example_images()
    assert torch.equal(View(64)(images), images)
    assert torch.equal(View(64, mirrored=True)(images), images.flip(-1))
    assert torch.equal(View(64, quarters=1, mirrored=True)(images)[..., 0, 0], images[..., -1, -1])
    assert torch.equal(View(64, quarters=2)(images), images.flip((2, 3)))


def test_a_view_at_another_size_keeps_the_mean_and_gives_gradients_back() -> None:
    images = example_images().requires_grad_(True)
    viewed = View(96, quarters=3)(images)
    assert viewed.shape == (2, 3, 96, 96)
    assert viewed.mean().item() == pytest.approx(images.mean().item(), abs=0.01)
    (grad,) = torch.autograd.grad(viewed.square().sum(), images)
    assert bool((grad != 0).all())


def test_views_are_drawn_from_all_sizes_and_turns() -> None:
    rng = np.random.default_rng(0)
    views = [draw_view(rng) for _ in range(600)]
    assert {view.side for view in views} == set(SIDES)
    assert {(view.quarters, view.mirrored) for view in views} == {(q, m) for q in range(4) for m in (False, True)}
    upright = sum(view.quarters == 0 and not view.mirrored for view in views) / len(views)
    assert upright == pytest.approx(0.5 + 0.5 / 8, abs=0.06)


@pytest.mark.weights
def test_a_frozen_encoder_through_a_view_gets_that_view() -> None:
    from codefend.encoders.views import ViewedEncoder

    encoder, images = ViewedEncoder("lite0"), torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    turned = encoder.through(View(160, quarters=1))
    assert turned.encoder is encoder.encoder
    assert encoder.view == View()
    assert turned.features(images).shape[1] == 25
    expected = encoder.encoder(View(160, quarters=1)(images))
    assert torch.allclose(turned.features(images), expected)
    assert not torch.allclose(encoder.features(images), encoder.through(View(128, mirrored=True)).features(images))
