"""Networks accept images from another device; PyTorch's `meta` device replaces a GPU in these tests.

A meta tensor has a shape and a place but no values, and an operation that mixes it with a CPU tensor fails.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from codefend import purifiers
from codefend.bench.craft import KnownSeedPurifier
from codefend.bench.judge import RecordingPurifier
from codefend.core import devices
from codefend.core.seeds import make_generator
from codefend.defense import Defense, StraightThrough
from codefend.encoders.views import ViewedEncoder
from codefend.purifiers.nets import NetConfig, PurifierNet
from codefend.training.bridge import BridgeConfig, BridgeLoss
from codefend.training.fit import MovingAverage
from codefend.training.guides import PocketGuide
from codefend.training.replay import Replays
from codefend.types import CodefendError
from codefend.victims.pocket import Pocket
from purifiers_kit import PlainPurifier

IMAGES = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
META = torch.device("meta")


@pytest.fixture(scope="module")
def distant(bare_pocket: Pocket) -> Pocket:
    """A pocket on the other device."""
    return copy.deepcopy(bare_pocket).to("meta")


def test_the_default_device_is_the_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VARIABLE, "cpu")
    assert devices.default_device() == torch.device("cpu")
    monkeypatch.setenv(devices.VARIABLE, "warp9")
    with pytest.raises(CodefendError, match=r"^CODEFEND_DEVICE=warp9: there is no such device; use cpu$"):
        devices.default_device()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError("Expected one of cpu, cuda, xpu, mkldnn device type at start of device string: npu"),
            "x: there is no such device; use cpu",
        ),
        (
            NotImplementedError("Could not run 'aten::empty' with arguments. This could be because\nmore"),
            "x: this device is not available (Could not run 'aten::empty' with arguments); use cpu",
        ),
    ],
)
def test_an_unavailable_device_is_one_short_line(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    def empty(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(CodefendError) as raised:
        devices.device_named("cpu", "x")
    assert str(raised.value) == text


def test_a_pocket_moves_images_to_itself(distant: Pocket) -> None:
    assert distant.device == META
    images = IMAGES.to("meta").requires_grad_()
    loss = distant.loss(images, ["Describe the image.", "What color is the car?"], ["a red car", "red"])
    assert loss.device == META
    assert loss.shape == (2,)
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    assert gradient.shape == images.shape
    assert distant.word_scores(images, [" dog", " red car"]).shape == (2, 16, 2)


def test_the_terms_of_a_bridge_stay_on_the_images_device(distant: Pocket, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = ViewedEncoder("lite0")
    tower.encoder.to("meta")
    net = PurifierNet(NetConfig(channels=(8, 8), blocks=(1, 1))).to("meta")
    images = IMAGES.to("meta")
    config = BridgeConfig(w_identity=1.0, gamma=0.05)
    loss = BridgeLoss(config, net, MovingAverage(net), PocketGuide(distant, [tower]), Replays(max_eps=0.1, rel_step=1))
    terms = loss.terms(images, images, 0, make_generator(0))
    assert set(terms) == {"bridge", "identity", "features", "direction", "words"}
    assert all(term.device == META for term in terms.values())


@pytest.mark.parametrize("name", ["bridge", "diffpure:t=0.05,steps=2", "bitdepth", "median", "blur"])
def test_purifiers_follow_the_images(name: str) -> None:
    base, _, options = name.partition(":")
    chosen = dict(item.split("=") for item in options.split(",") if item)
    purifier = purifiers.load(base, **{k: float(v) if "." in v else int(v) for k, v in chosen.items()})
    assert purifier(IMAGES.to("meta"), generator=make_generator(0)).device == META


class Elsewhere(PlainPurifier):
    """A purifier on another device that records its inputs and returns images that can be moved back."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        self.inputs.append(images)
        return torch.zeros(images.shape)


WRAPPERS = [lambda p: p, StraightThrough, RecordingPurifier, lambda p: KnownSeedPurifier(p, 0)]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["bare", "straight through", "watched", "known seed"])
def test_a_defense_purifies_on_the_default_device(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VARIABLE, "meta")
    purifier = Elsewhere()
    purified = Defense(wrap(purifier)).images(IMAGES.clone().requires_grad_(), generator=make_generator(0))
    assert purified.device == IMAGES.device
    (inputs,) = purifier.inputs
    assert inputs.device == META
    assert inputs.requires_grad  # so that attacks go through


@pytest.mark.parametrize("wrap", WRAPPERS[:3], ids=["bare", "straight through", "watched"])
def test_a_defense_on_the_images_device_changes_nothing(wrap: Any) -> None:
    images, purifier = IMAGES[..., :32, :32].clone().requires_grad_(), purifiers.load("bridge")
    purified = Defense(wrap(purifier)).images(images, generator=make_generator(2))
    assert torch.equal(purified, purifier(images, generator=make_generator(2)))
    (gradient,) = torch.autograd.grad(purified.square().sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_mixed_precision_needs_hardware_support(monkeypatch: pytest.MonkeyPatch) -> None:
    def product() -> torch.dtype:
        with devices.mixed_precision(torch.device("cpu")):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    assert product() == torch.float32  # as the tests want it
    monkeypatch.delenv(devices.PRECISION)
    assert product() == (torch.bfloat16 if devices._multiplies_bfloat16() else torch.float32)
    monkeypatch.setenv(devices.PRECISION, "bf16")
    with pytest.raises(CodefendError, match="CODEFEND_PRECISION=bf16"):
        product()


def test_purification_is_in_mixed_precision_and_attacks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_multiplies_bfloat16", lambda: True)  # emulated where there are no units
    purifier = purifiers.load("bridge")
    images = torch.rand(1, 3, 32, 32, generator=make_generator(1))

    def purified(images: torch.Tensor) -> torch.Tensor:
        return purifier(images, generator=make_generator(2)).detach()

    exact = purified(images)
    monkeypatch.delenv(devices.PRECISION)
    assert torch.equal(purified(images.clone().requires_grad_()), exact)
    with torch.no_grad():
        assert 0 < float((purified(images.clone().requires_grad_()) - exact).abs().max()) < 2 / 255
