"""The robust bridge: batches, loss terms of every threat, resumption, and early errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from codefend.core.runs import read_rows
from codefend.encoders.families import FamilyConfig, FamilyEncoder, save_encoder
from codefend.encoders.views import ViewedEncoder
from codefend.purifiers.nets import NetConfig, PurifierNet, load_net, save_net
from codefend.tasks.natural_images import NaturalConfig
from codefend.training import robust, train
from codefend.training.guides import AnswerGuide, PocketGuide
from codefend.training.robust import RobustBatches, RobustConfig, RobustLoss, Threat, ThreatBatch, draw_sigmas
from codefend.types import CodefendError

Interrupt = Callable[[Callable[[], object], int], None]
NET = NetConfig(channels=(8, 8, 8, 8), blocks=(1, 1, 1, 1))


class Words:
    """A pocket with word scores alone: a fixed linear map of 32-pixel cells."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        self.cells = torch.nn.Conv2d(3, 16, 32, 32).requires_grad_(False)
        self.table = torch.randn(16, 200)

    def word_scores(self, images: Tensor, words: Sequence[str]) -> Tensor:
        tokens = self.cells(images).flatten(2).transpose(1, 2)
        normalize = torch.nn.functional.normalize
        return normalize(tokens, dim=-1) @ normalize(self.table[:, : len(words)], dim=0)

    def loss(self, images: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """A loss that depends on each answer's length: the brightness it asks for."""
        wanted = torch.tensor([len(answer) % 7 / 7 for answer in answers])
        return (images.flatten(1).mean(1) - wanted).square()


def load_toy_guide(victim: str, encoders: Sequence[str]) -> PocketGuide:
    return PocketGuide(Words(), [ViewedEncoder(name) for name in encoders])  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RobustConfig:
    monkeypatch.setattr(robust, "load_guide", load_toy_guide)
    torch.manual_seed(0)
    save_net(tmp_path / "prior", PurifierNet(NET), kind="prior")
    save_encoder(tmp_path / "encoder", FamilyEncoder(FamilyConfig("convnet", width=64, depth=1)))
    return RobustConfig(
        prior=str(tmp_path / "prior"), channels=NET.channels, blocks=NET.blocks, encoders=(),
        zoo=(str(tmp_path / "encoder"),), natural=NaturalConfig(shares=(0, 1, 0)), steps=8, save_every=4, warmup=2,
        sides=(32, 64), batches=(6, 5), shares=(0.5, 0.5), words_batch=5, damage=0.3, bare=0.5, strength=1.1,
    )  # fmt: skip


@pytest.mark.parametrize("teacher", [False, True])
def test_every_threat_gives_finite_terms_and_gradients_to_the_network(config: RobustConfig, teacher: bool) -> None:
    torch.manual_seed(0)
    net, guide = PurifierNet(NET), load_toy_guide("", config.zoo)
    loss = RobustLoss(config, net, guide, PurifierNet(NET).requires_grad_(False) if teacher else None)
    threats: dict[Threat, int] = {"adaptive": 64, "oblivious": 64, "damage": 64, "words": 128}
    for threat, side in threats.items():
        net.zero_grad()
        row = loss(ThreatBatch(torch.rand(5, 3, side, side), threat), 3)
        terms = [value for value in row.values() if isinstance(value, Tensor)]
        torch.stack(terms).sum().backward()
        assert all(bool(torch.isfinite(term)) for term in terms), threat
        assert (float(torch.as_tensor(row["words"]).detach()) > 0) == (threat == "words")
        assert row["adaptive"] == (threat in ("adaptive", "words"))
        assert net.head.weight.grad is not None
        assert float(net.head.weight.grad.abs().sum()) > 0, threat


@pytest.mark.parametrize("steps", [1, 3])
def test_the_language_model_loss_is_attacked_and_guides_where_there_are_texts(config: RobustConfig, steps: int) -> None:
    config = replace(config, words=1.0, answers=1.0, adaptive_steps=steps)
    batch = RobustBatches(config)(4)
    assert batch.threat == "answers"
    clean = round(config.clean * len(batch.images))
    assert len(batch.texts) == len(batch.images)
    assert batch.texts[clean : 2 * clean] == batch.texts[:clean]  # the same images once more
    torch.manual_seed(0)
    net = PurifierNet(NET)
    loss = RobustLoss(config, net, load_toy_guide("", config.zoo))
    row = loss(batch, 3)
    answers = row["answers"]
    assert isinstance(answers, Tensor)
    assert float(answers.detach()) > 0
    answers.backward()
    assert net.head.weight.grad is not None
    assert float(net.head.weight.grad.abs().sum()) > 0
    without = RobustLoss(config, net, load_toy_guide("", config.zoo))(batch._replace(threat="words", texts=()), 3)
    assert float(torch.as_tensor(without["answers"])) == 0  # every batch has the same terms


def test_behind_much_noise_the_distance_of_scenes_counts_less(config: RobustConfig) -> None:
    torch.manual_seed(0)
    net, guide = PurifierNet(NET), load_toy_guide("", config.zoo)
    config = replace(config, high_sigma=(0.2, 0.2), adaptive_steps=2)
    losses = [RobustLoss(replace(config, faithful_sigma=sigma), net, guide) for sigma in (0.0, 0.05)]
    for threat, side, ratio in (("words", 128, 0.25), ("adaptive", 64, 1.0)):
        batch = ThreatBatch(torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(1)), threat)  # type: ignore[arg-type]
        whole, lean = (float(torch.as_tensor(loss(batch, 3)["distance"]).detach()) for loss in losses)
        assert lean == pytest.approx(ratio * whole, rel=1e-5)


def test_the_teachers_output_is_the_target_of_oblivious_attacks_alone(config: RobustConfig) -> None:
    guide, teacher = load_toy_guide("", config.zoo), PurifierNet(NET).requires_grad_(False)
    losses = [RobustLoss(replace(config, taught=1.0), PurifierNet(NET), guide, x) for x in (None, teacher)]
    images = torch.rand(5, 3, 64, 64)
    distances = {
        t: [float(torch.as_tensor(x(ThreatBatch(images, t), 3)["distance"]).detach()) for x in losses]
        for t in ("oblivious", "damage")
    }
    assert distances["damage"][0] == distances["damage"][1]
    assert distances["oblivious"][1] < 0.5 * distances["oblivious"][0]  # two networks that are both the identity


def test_batches_depend_on_their_number_alone_and_hold_attacked_copies_of_the_clean_images(
    config: RobustConfig,
) -> None:
    batches = RobustBatches(replace(config, words=0.0))
    first, again = batches(4), batches(4)
    assert torch.equal(first.images, again.images)
    assert first.threat == again.threat
    clean = round(config.clean * len(first.images))
    assert clean
    assert torch.equal(first.images[:clean], first.images[clean : 2 * clean])
    assert {batches(number).threat for number in range(20)} == {"adaptive", "oblivious", "damage"}


def test_noise_is_little_under_oblivious_attacks_and_more_under_adaptive_ones() -> None:
    config, rng = RobustConfig(), np.random.default_rng(0)
    little, much = (draw_sigmas(config, threat, rng, 400) for threat in ("oblivious", "adaptive"))
    assert float((little == 0).float().mean()) == pytest.approx(config.noise_free, abs=0.08)
    low, high = config.low_sigma
    assert bool(((little == 0) | ((little >= low) & (little <= high))).all())
    low, high = config.high_sigma
    assert bool(((much >= low) & (much <= high)).all())


def test_an_interrupted_training_equals_an_uninterrupted_one_and_saves_a_bridge_with_its_noise(
    config: RobustConfig, tmp_path: Path, interrupt: Interrupt
) -> None:
    folder = train(config, tmp_path / "whole")
    whole, meta = load_net(folder)
    assert (meta["kind"], meta["options"]) == ("bridge", {"sigma": config.sigma, "strength": config.strength})
    interrupt(lambda: train(config, tmp_path / "cut"), 6)
    cut, _ = load_net(train(config, tmp_path / "cut"))
    assert all(torch.equal(value, cut.state_dict()[name]) for name, value in whole.state_dict().items())
    assert {row["side"] for row in read_rows(tmp_path / "whole")} <= {32.0, 64.0, 128.0}
    text = (folder / "README.md").read_text()
    assert "8 of 8 steps" in text
    assert "N-FGSM through the purifier" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": (64,)}, "one entry for each size"),
        ({"encoders": ()}, "at least one encoder"),
        ({"encoders": ("victim",)}, "none of the victim's"),
        ({"strength": 2.0}, "above 0, to 1.5"),
        ({"low_sigma": (0.0, 0.1)}, "above 0 and ordered"),
        ({"high_sigma": (0.2, 0.1)}, "above 0 and ordered"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CodefendError, match=message):
        RobustConfig(**changes)


def test_a_victim_without_word_scores_fails_before_the_run_folder_exists(
    config: RobustConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "load_guide", lambda victim, encoders: AnswerGuide(Words(), []))  # type: ignore[arg-type]
    with pytest.raises(CodefendError, match="no word scores"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
