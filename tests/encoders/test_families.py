"""Encoders of other families: shapes, gradients, files, and errors that name the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from codefend import encoders
from codefend.encoders import FAMILIES
from codefend.encoders.families import SIZES, FamilyConfig, FamilyEncoder, load_encoder, save_encoder
from codefend.types import CodefendError
from codefend.victims.encoder import EncoderVictim


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_tokens_at_stride_16_with_a_gradient_and_its_files_load(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = FamilyEncoder(FamilyConfig(family, width=64, depth=1))
    images = torch.rand(2, 3, 64, 96, requires_grad=True)
    tokens = encoder(images)
    assert tokens.shape == (2, 4 * 6, 64)
    tokens.square().sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0
    save_encoder(tmp_path, encoder)
    loaded = encoders.load(str(tmp_path))
    assert torch.allclose(loaded(images), tokens, atol=2e-2)  # float16 on disk
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_every_family_has_a_default_size_and_a_source() -> None:
    assert SIZES.keys() == FAMILIES.keys()
    assert all(spec.name == name and spec.source for name, spec in FAMILIES.items())


def test_an_unknown_family_or_size_is_refused() -> None:
    with pytest.raises(CodefendError, match="known: vit16"):
        FamilyConfig("vit32")
    with pytest.raises(CodefendError, match="multiple of 64"):
        FamilyConfig("resnet", width=100)


@pytest.mark.parametrize("content", ["", '{"net": {}}', '{"net": {"family": "vit16", "width": 64, "depth": 1}}'])
def test_a_folder_without_an_encoder_names_the_command_that_trains_one(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CodefendError, match="codefend train encoder"):
        load_encoder(tmp_path)


def test_a_family_by_name_asks_for_a_folder_of_weights() -> None:
    with pytest.raises(CodefendError, match="train encoder --set family=vgg"):
        encoders.load("vgg")


def test_an_encoder_without_classes_is_no_victim(tmp_path: Path) -> None:
    save_encoder(tmp_path, FamilyEncoder(FamilyConfig("convnet", width=64, depth=1)))
    with pytest.raises(CodefendError, match="no classes"):
        EncoderVictim(str(tmp_path))
