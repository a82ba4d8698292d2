"""Folders and models that are no image-text-to-text victim: the error names the cause and the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_tiny
from codefend.types import CodefendError
from codefend.victims.hf import load
from codefend.victims.hf.victim import HFVictim


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_tiny.folder_of("idefics3", tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("config.json",), "no config.json; it is not a Transformers checkpoint"),
        (("processor_config.json", "preprocessor_config.json"), "save the model's processor"),
        (("tokenizer*",), "save the model's tokenizer"),
        (("*.safetensors",), r"no \*.safetensors; save the model with save_pretrained"),
    ],
)
def test_a_folder_without_a_file_names_it(patterns: tuple[str, ...], words: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for pattern in patterns:
        for path in copy.glob(pattern):
            path.unlink()
    with pytest.raises(CodefendError, match=words) as caught:
        load(f"hf:{copy}")
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (path,) = copy.glob("*.safetensors")
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[-1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CodefendError, match=r"weight .* holds NaN or infinity; download or save the checkpoint again"):
        load(f"hf:{copy}")


def test_a_language_model_is_refused_by_its_type(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    LlamaConfig().save_pretrained(copy)
    with pytest.raises(CodefendError, match="'llama' is no image-text-to-text model"):
        load(f"hf:{copy}")


def test_an_image_that_the_processor_refuses_is_named_with_its_size() -> None:
    victim = HFVictim(*hf_tiny.build("qwen2_5_vl"), name="hf:tiny")
    with pytest.raises(CodefendError, match="does not accept an image of 3x900 pixels"):
        victim.loss(torch.rand(1, 3, 900, 3), ["what?"], ["a"])
