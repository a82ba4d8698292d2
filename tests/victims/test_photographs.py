"""The pocket's tokens for photographs: they open for photographs alone, name classes, and have a gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend.encoders import class_names
from codefend.encoders.base import Classifier, Encoder
from codefend.types import CodefendError
from codefend.victims import photographs
from codefend.victims.photographs import NAME_TOKENS, TOKENS, PhotographTokens

WIDTH, DIM, CLASSES = 3, 6, 5


class BrightnessClassifier(Classifier):
    """The class is the brightness in fifths, the more certain the larger the weight."""

    name, width = "brightness", WIDTH

    def features(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))[:, None].expand(-1, TOKENS, -1)

    def logits(self, images: Tensor) -> Tensor:
        return -200 * (images.mean((1, 2, 3))[:, None] - torch.linspace(0.1, 0.9, CLASSES)).square()


@pytest.fixture
def module() -> PhotographTokens:
    generator = torch.Generator().manual_seed(1)
    names = torch.randn(CLASSES, NAME_TOKENS, DIM, generator=generator)
    module = PhotographTokens(WIDTH, names, F.normalize(torch.randn(4, DIM, generator=generator), dim=-1))
    with torch.no_grad():
        module.gate.weight[0] = 20.0  # opens with the mean of the first channel
        module.gate.bias.fill_(-10.0)
        module.confidence.copy_(torch.stack([torch.zeros(DIM), torch.ones(DIM)]))
    return module


def blend(module: PhotographTokens, images: Tensor) -> tuple[Tensor, Tensor]:
    encoder = BrightnessClassifier()
    vision = torch.zeros(len(images), TOKENS, DIM)
    return vision, module.blend(vision, vision + 1.0, encoder(images), images, encoder)


def test_closed_for_every_image_it_returns_the_very_tensor(module: PhotographTokens) -> None:
    vision, out = blend(module, torch.full((2, 3, 8, 8), 0.3))
    assert out is vision


def test_open_for_one_image_it_leaves_the_others_alone(module: PhotographTokens) -> None:
    vision, out = blend(module, torch.stack([torch.full((3, 8, 8), 0.3), torch.full((3, 8, 8), 0.7)]))
    assert torch.equal(out[0], vision[0])
    assert torch.allclose(out[1, -NAME_TOKENS:], module.names[3], atol=1e-2)  # the fourth class, and hardly another


def test_confidence_is_a_step_at_half(module: PhotographTokens) -> None:
    rows = torch.tensor([[0.7, 0.3, 0.0, 0.0, 0.0], [0.3, 0.3, 0.2, 0.1, 0.1]])
    sure, unsure = module.tokens(rows)[:, TOKENS - NAME_TOKENS - 1]
    assert sure.min() > 0.95
    assert unsure.max() < 0.05


def test_gradient_passes_the_gate_and_the_classes_to_the_pixels(module: PhotographTokens) -> None:
    images = torch.full((1, 3, 8, 8), 0.52).requires_grad_()
    _, out = blend(module, images)
    (gradient,) = torch.autograd.grad(out.square().sum(), images)
    assert gradient.abs().max() > 0


def test_every_class_name_fits() -> None:
    names = class_names()
    assert len(names) == len(set(names)) == 1000
    assert names[967] == "espresso"


def test_an_encoder_without_classes_is_refused() -> None:
    encoder = Encoder()
    encoder.name = "plain"
    with pytest.raises(CodefendError, match="'plain' has none"):
        photographs.build(encoder, ["a word"], lambda texts: [torch.ones(1, DIM) for _ in texts])
