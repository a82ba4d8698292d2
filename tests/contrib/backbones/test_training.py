"""Fine-tuning diffusers models on pairs: both kinds learn, resume exactly, and load as purifiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusers_tiny
from codefend import purifiers
from codefend.contrib.backbones.latent import load_latents
from codefend.contrib.backbones.training import HFBridgeConfig, LatentConfig, LatentTuner
from codefend.core.checkpoints import save_checkpoint
from codefend.core.runs import open_run, read_rows
from codefend.training import train
from codefend.training.pairs import read_pairs
from codefend.types import CodefendError

SHORT = {"steps": 3, "batch": 2, "micro": 2, "warmup": 1, "save_every": 1}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A bank of two shards with a fixed perturbation, and both models."""
    root = tmp_path_factory.mktemp("backbones")
    draw = torch.Generator().manual_seed(0)
    wave = 16 * (torch.arange(16) % 2 * 2 - 1).expand(16, 16)
    for shard in range(2):
        clean = torch.randint(64, 192, (6, 3, 4, 4), generator=draw).repeat_interleave(4, 2).repeat_interleave(4, 3)
        pair = {"clean": clean.to(torch.uint8), "attacked": (clean + wave).to(torch.uint8)}
        save_checkpoint(root / f"pairs-{shard:05d}.safetensors", pair, {"kind": "features"})
    with open_run(root, {"pairs": True, "steps": 8}) as bank:
        row = {"kind": "features", "target": "lite0", "pairs": [{"eps": 16 / 255, "fall": 0.5}] * 12}
        bank.append({"key": "shard-0", **row})
    models = {
        "ddpm": diffusers_tiny.ddpm(root / "ddpm"),
        "guided": diffusers_tiny.ddpm(root / "guided", variance="learned_range", out_channels=6),
        "stable": diffusers_tiny.stable_diffusion(root / "sd"),
        "xl": diffusers_tiny.stable_diffusion_xl(root / "xl"),
    }
    return {"pairs": str(root), **{name: str(path) for name, path in models.items()}}


def config(kind: str, places: dict[str, str], **changes: Any) -> HFBridgeConfig | LatentConfig:
    make, model = (HFBridgeConfig, "ddpm") if kind == "hf-bridge" else (LatentConfig, "stable")
    return make(**{**SHORT, "model": places[model], "pairs": (places["pairs"],), **changes})


def image() -> Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["hf-bridge", pytest.param("latent", marks=pytest.mark.slow)])
def test_an_interrupted_training_equals_an_uninterrupted_one(
    kind: str, places: dict[str, str], tmp_path: Path, interrupt: Callable[[Callable[[], object], int], None]
) -> None:
    whole = train(config(kind, places), tmp_path / "whole")
    interrupt(lambda: train(config(kind, places), tmp_path / "cut"), 2)
    cut = train(config(kind, places), tmp_path / "cut")
    first, second = (purifiers.load(f)(image(), generator=torch.Generator().manual_seed(1)) for f in (whole, cut))
    assert torch.equal(first, second)
    assert [row["step"] for row in read_rows(tmp_path / "cut")] == [1, 2, 3]


def test_a_training_cut_short_behind_its_last_checkpoint_has_its_weights(
    places: dict[str, str], tmp_path: Path, interrupt_saved: Callable[..., None]
) -> None:
    chosen = config("hf-bridge", places, steps=2, micro=1, lr=1e-2)
    whole = train(chosen, tmp_path / "whole")
    interrupt_saved(lambda: train(chosen, tmp_path / "cut"), 2)
    cut = train(chosen, tmp_path / "cut")  # complete already
    assert torch.equal(purifiers.load(whole)(image()), purifiers.load(cut)(image()))


@pytest.mark.slow
def test_a_pixel_model_learns_to_remove_the_perturbation_of_its_pairs(places: dict[str, str], tmp_path: Path) -> None:
    folder = train(config("hf-bridge", places, steps=24, batch=4, micro=1, lr=4e-3, save_every=24), tmp_path)
    losses = [row["pairs"] for row in read_rows(tmp_path)]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert purifiers.load(folder).evaluations == 1


def test_adapters_learn(places: dict[str, str]) -> None:
    """On one batch with one noise: the other weights are random and frozen, so the loss falls little."""
    tuner = LatentTuner(config("latent", places, t=0.4, rank=4), torch.device("cpu"))  # type: ignore[arg-type]
    clean, attacked = (side[:4].float() / 255 for side in next(iter(read_pairs(places["pairs"])))[:2])
    optimizer = torch.optim.AdamW(tuner.parameters.values(), lr=3e-2)
    losses = []
    for _ in range(12):
        loss, _ = tuner.loss(clean, attacked, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.97 * losses[0]


def test_adapters_carry_their_options(places: dict[str, str], tmp_path: Path) -> None:
    shape = {"steps": 2, "micro": 1, "lr": 5e-2, "save_every": 2, "t": 0.4, "rank": 4, "purify_steps": 2}
    folder = train(config("latent", places, **shape), tmp_path)
    purifier: Any = purifiers.load(folder)
    assert (purifier.options.t, purifier.options.steps) == (0.4, 2)
    bare = purifiers.load(f"hf-latent:{places['stable']}:t=0.4,steps=2")
    ours, theirs = (p(image(), generator=torch.Generator().manual_seed(1)) for p in (purifier, bare))
    assert float((ours - theirs).abs().max()) > 1e-3
    alone = purifiers.load(f"{folder}:t=0")  # the name of the autoencoder alone
    assert torch.allclose(alone(image()), purifiers.load(f"hf-latent:{places['stable']}:t=0")(image()), atol=1e-6)


@pytest.mark.parametrize(("kind", "model"), [("hf-bridge", "guided"), ("latent", "xl")])
def test_guided_diffusion_and_xl_can_be_trained(kind: str, model: str, places: dict[str, str], tmp_path: Path) -> None:
    folder = train(config(kind, places, model=places[model], steps=1, lr=1e-2, save_every=1, micro=1), tmp_path)
    (row,) = read_rows(tmp_path)
    assert row["grad_norm"] > 0
    card = (folder / "README.md").read_text()
    assert "features on lite0 (12 pairs, 16.0 to 16.0/255)" in card
    assert "whose licence holds" in card
    purifier, draw = purifiers.load(folder), torch.Generator().manual_seed(1)
    before: Any = purifiers.load(f"hf-{kind.removeprefix('hf-')}:{places[model]}", **vars(purifier.options))  # type: ignore[attr-defined]
    assert not torch.equal(purifier(image(), generator=draw), before(image(), generator=draw.manual_seed(1)))


@pytest.mark.slow
@pytest.mark.weights
def test_features_can_guide(places: dict[str, str], tmp_path: Path) -> None:
    for kind in ("hf-bridge", "latent"):
        train(config(kind, places, steps=1, micro=1, encoders=("lite0",)), tmp_path / kind)
        (row,) = read_rows(tmp_path / kind)
        assert row["features"] > 0
        assert row["grad_norm"] > 0


def test_fresh_adapters_change_nothing(places: dict[str, str]) -> None:
    from codefend.contrib.backbones.latent import add_adapters

    latents = load_latents(places["stable"])
    z, s, sigma = torch.randn(1, 4, 8, 8), torch.zeros(1), torch.ones(1)
    before = latents.denoiser(z, s, sigma)
    added = add_adapters(latents, 4)
    assert len(added) == 2 * 4 * 2 * 4  # A and B, four projections, two attentions, four transformer blocks
    assert torch.equal(latents.denoiser(z, s, sigma), before)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("latent", {"model": ""}, "name a model"),
        ("latent", {"model": "./nowhere"}, "no such model folder"),
        ("hf-bridge", {"pairs": ()}, "needs pairs"),
        ("latent", {"t": 0.0}, "needs noise"),
        ("hf-bridge", {"micro": 0}, "micro=0"),
    ],
)
def test_a_mistake_is_one_error_and_leaves_no_folder(
    kind: str, change: dict[str, Any], words: str, places: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CodefendError, match=words):
        train(config(kind, places, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
