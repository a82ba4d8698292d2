"""FARE: an encoder that a pocket loads, resumption, a falling loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from codefend.contrib.fare import FareConfig, fare_loss
from codefend.core import runs
from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.training import train
from codefend.types import CodefendError
from training_kit import generator

if TYPE_CHECKING:
    pass


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "pocket"
    save_checkpoint(folder / "model.safetensors", {"connector.scale": torch.tensor(0.5)})
    (folder / "config.json").write_text(json.dumps({"encoder": "lite0", "rank": 4}))
    return folder


@pytest.mark.weights
def test_fare_trains_an_encoder_that_a_pocket_reads(base: Path, tmp_path: Path) -> None:
    from codefend import encoders
    from codefend.victims.pocket import read_encoder

    fare = FareConfig(victim=str(base), steps=2, batch=2, mining_steps=1, warmup=1, save_every=1, lr=1e-3)
    folder = train(fare, tmp_path / "fare")
    assert json.loads((folder / "config.json").read_text()) == {"encoder": "lite0", "rank": 4, "vocabulary": []}
    state, _ = load_checkpoint(folder / "model.safetensors")
    assert float(state["connector.scale"]) == 0.5  # the pocket's own part as it was
    assert {value.dtype for key, value in state.items() if key.startswith("encoder.")} == {torch.float16}
    encoder, original = encoders.load("lite0"), encoders.load("lite0")
    assert read_encoder(encoder, state, folder)
    image = torch.rand(1, 3, 64, 64, generator=generator())
    change = (encoder(image) - original(image)).norm() / original(image).norm()
    assert 1e-3 < float(change) < 1
    assert "4/255" in (folder / "README.md").read_text()
    again = train(FareConfig(**{**fare.__dict__, "victim": str(folder), "steps": 1}), tmp_path / "again")  # resumes
    assert runs.read_rows(tmp_path / "again")[0]["clean"] == 0  # the original is now the tuned one
    with pytest.raises(CodefendError, match="another encoder"):
        read_encoder(encoders.load("lite2"), load_checkpoint(again / "model.safetensors")[0], again)


@pytest.mark.weights
def test_fare_cut_short_behind_its_last_checkpoint_has_its_weights(
    base: Path, tmp_path: Path, interrupt_saved: Callable[..., None]
) -> None:
    chosen = FareConfig(victim=str(base), steps=2, batch=1, mining_steps=1, warmup=1, save_every=1, lr=1e-3)
    whole = train(chosen, tmp_path / "whole")
    interrupt_saved(lambda: train(chosen, tmp_path / "cut"), 2)
    ours, theirs = (
        load_checkpoint(folder / "model.safetensors")[0] for folder in (whole, train(chosen, tmp_path / "cut"))
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.weights
def test_the_loss_falls_on_the_same_images() -> None:
    from codefend import encoders

    encoder, original = encoders.load("lite0"), encoders.load("lite0")
    fare, images = (
        FareConfig(mining_steps=2, eps=8 / 255, mining_step=4 / 255),
        torch.rand(2, 3, 64, 64, generator=generator()),
    )
    optimizer = torch.optim.Adam(encoder.parameters(), lr=5e-4)
    losses = []
    for _ in range(4):
        terms: Any = fare_loss(fare, encoder, original, images, 0)
        losses.append(terms["loss"].item())
        assert terms["clean"] < losses[-1]  # the attack moves the features by more than the drift
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert encoder.fc.weight.grad is None  # its classifier is no part of the tokens


@pytest.mark.parametrize("text", ["", "{", '{"rank": 4}'])
def test_a_victim_without_pocket_weights_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CodefendError, match="no folder of pocket weights"):
        train(FareConfig(victim=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.weights
def test_tecoas_loss_falls_on_the_same_images(bare_pocket: Any) -> None:
    from codefend import encoders
    from codefend.contrib.fare import TecoaConfig, tecoa_loss

    encoder, original = encoders.load("lite0"), encoders.load("lite0")
    images = torch.rand(1, 3, 128, 128, generator=generator())
    tecoa = TecoaConfig(mining_steps=1, eps=8 / 255, mining_step=8 / 255)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=5e-4)
    losses = []
    for _ in range(4):
        terms: Any = tecoa_loss(tecoa, bare_pocket, encoder, original, images, 0)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["loss"].detach()))
    assert losses[-1] < losses[0]
