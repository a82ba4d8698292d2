"""The detection score: what it sees, that its fit and threshold are right, and that it travels with the weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from codefend import purifiers
from codefend.core import runs
from codefend.core.checkpoints import save_checkpoint
from codefend.purifiers.bridge import Bridge, BridgeOptions
from codefend.purifiers.detection import FLOOR, RAMP, TEXTURE_FLOOR, Detector, features, threshold_at
from codefend.purifiers.nets import NetConfig, PurifierNet, save_net
from codefend.training.calibrate import CalibrateConfig, calibrate
from codefend.types import CodefendError


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_features_have_their_documented_magnitudes() -> None:
    purified = torch.full((3, 3, 16, 24), 0.5)
    flat, fine, patch = torch.zeros(3, 3, 16, 24)
    flat += 0.1
    rows, columns = torch.arange(16), torch.arange(24)
    fine += 0.1 * ((rows[:, None] + columns) % 2 * 2 - 1)
    patch[:, :8, 8:16] = 0.3
    magnitudes = features(purified + torch.stack([flat, fine, patch]), purified).exp().T
    rms, small, worst, texture, grey, half, quarter, mean = magnitudes
    assert rms.tolist() == pytest.approx([0.1, 0.1, 0.3 * (1 / 6) ** 0.5], rel=1e-4)
    assert float(small[0]) == pytest.approx(FLOOR, rel=0.01)  # a flat change has no fine part
    assert float(small[1]) == pytest.approx(0.09, rel=0.15)  # a checkerboard is nothing else
    assert worst.tolist() == pytest.approx([0.1, 0.1, 0.3], rel=1e-4)
    assert texture.tolist() == pytest.approx([TEXTURE_FLOOR] * 3, rel=1e-3)
    assert grey.tolist() == pytest.approx(rms.tolist(), rel=1e-4)  # the same in all colours
    assert float(half[1]) == pytest.approx(FLOOR, rel=0.01)  # the checkerboard's squares are one pixel wide
    assert float(quarter[2]) > 0.05  # the patch has edges there
    assert mean.tolist() == pytest.approx([0.1, 0.1, 0.3 / 6], rel=1e-3)  # a patch changes few pixels much
    assert float(features(purified, purified, texture_floor=0.1)[0, 3].exp()) == pytest.approx(0.1, rel=1e-3)


def test_nothing_removed_gives_finite_scores_and_gradients() -> None:
    images = torch.full((1, 3, 5, 5), 0.5).requires_grad_()
    detector = Detector((1.0, 1.0, 1.0, 1.0), 0.0, 0.5, 0.01)
    detector.logit(images, images.detach()).sum().backward()
    assert images.grad is not None
    assert bool(images.grad.isfinite().all())
    dot = torch.full((1, 3, 1, 1), 0.5)
    assert features(dot, 0.9 * dot).isfinite().all()
    half = torch.rand(1, 3, 16, 16, generator=gen())
    assert features(half.half(), half.half() * 0.999).isfinite().all()


def test_a_detector_of_four_weights_uses_the_first_four_features() -> None:
    images, purified = torch.rand(2, 2, 3, 16, 16, generator=gen())
    four, eight = (Detector((1.0, -2.0, 0.5, 3.0, *zeros), 0.1, 0.5, 0.01) for zeros in ((), (0.0,) * 4))
    assert torch.equal(four.logit(images, purified), eight.logit(images, purified))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3])
def test_at_most_the_requested_share_is_above_the_threshold(rate: float) -> None:
    scores = torch.rand(500, generator=gen())
    threshold = threshold_at(scores, rate)
    assert float((scores > threshold).float().mean()) == pytest.approx(rate, abs=0.003)
    assert float((torch.full((500,), 0.2) > threshold_at(torch.full((500,), 0.2), rate)).float().mean()) == 0


# --- calibrating weights ---------------------------------------------------------------------------------------------


@cache
def smoothing_net() -> PurifierNet:
    """A tiny network trained for a moment to remove fine noise, so that residuals follow the attack."""
    torch.manual_seed(0)
    net = PurifierNet(NetConfig(channels=(6, 8), blocks=(1, 1), embedding=16))
    optimizer, ones, zeros = torch.optim.Adam(net.parameters(), lr=0.02), torch.ones(4), torch.zeros(4)
    for step in range(25):
        clean = smooth(step, 4)
        loss = (net(clean + 0.03 * torch.randn(clean.shape, generator=gen(step)).sign(), ones, zeros) - clean).abs()
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return net


def smooth(seed: int, count: int) -> Tensor:
    coarse = torch.rand(count, 3, 3, 3, generator=gen(seed))
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")


def bank(folder: Path, seed: int) -> Path:
    """64 pairs whose perturbation is a random sign pattern of 2 or 8/255."""
    run = runs.open_run(folder, {"pairs": True, "seed": seed})
    for shard in range(2):
        clean = smooth(100 * seed + shard, 32)
        eps = [2 / 255, 8 / 255] * 16
        signs = torch.randn(clean.shape, generator=gen(seed + shard)).sign()
        attacked = clean + torch.tensor(eps).view(-1, 1, 1, 1) * signs
        tensors = {"clean": clean, "attacked": attacked}
        eight = {name: (value.clamp(0, 1) * 255).round().to(torch.uint8) for name, value in tensors.items()}
        save_checkpoint(folder / f"pairs-{shard:05d}.safetensors", eight, {"kind": "noise"})
        pairs = [{"eps": e, "fall": 0.0} for e in eps]
        run.append({"key": f"shard-{shard}", "kind": "noise", "target": "nobody", "steps": 1, "pairs": pairs})
    return folder


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(
        "codefend.training.calibrate.draw_training_images",
        lambda rng, count, first_scene, own: smooth(first_scene, count),
    )
    save_net(tmp_path / "mine", smoothing_net(), kind="bridge", options={"evaluations": 2})
    return tmp_path / "mine"


def test_a_calibrated_detector_is_saved_with_the_weights(weights: Path, tmp_path: Path) -> None:
    config = CalibrateConfig(pairs=(str(bank(tmp_path / "bank", 1)),), clean=400, rate=0.02)
    detector = calibrate(weights, config)
    assert detector.false_positive_rate <= 0.06
    assert detector.calibration["clean_measured"] == 200
    assert detector.calibration["found"]["4-8/255"]["share"] > 0.9
    purifier = purifiers.load(weights)
    assert detector.texture_floor == TEXTURE_FLOOR
    assert purifier.detector == Detector.from_dict(json.loads(json.dumps(detector.to_dict())))
    clean = smooth(77, 16)
    attacked = (clean + 8 / 255 * torch.randn(clean.shape, generator=gen()).sign()).clamp(0, 1)
    assert float(purifier.score(attacked).min()) > detector.threshold > float(purifier.score(clean).median())
    # With other options the residuals are others: the plain size of the residual, no claim of a rate.
    other = purifiers.load(f"{weights}:evaluations=1")
    assert other.detector is None
    bare = Bridge(purifier.net, BridgeOptions(evaluations=1))  # type: ignore[attr-defined]
    assert torch.equal(other.score(clean), bare.score(clean))


def test_a_gate_lets_clean_images_pass_and_purifies_the_others(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="calibrate"):
        purifiers.load(f"{weights}:gate=true")
    detector = calibrate(weights, CalibrateConfig(pairs=(str(bank(tmp_path / "bank", 1)),), clean=400, rate=0.02))
    gated, plain = purifiers.load(f"{weights}:gate=true"), purifiers.load(weights)
    with pytest.raises(CodefendError, match="gate"):
        purifiers.load(f"{weights}:gate=true,evaluations=1")
    with pytest.raises(CodefendError, match="no detection score"):
        Bridge(smoothing_net(), BridgeOptions(gate=True))
    clean = smooth(78, 16)
    attacked = (clean + 8 / 255 * torch.randn(clean.shape, generator=gen()).sign()).clamp(0, 1)
    share = detector.gate_share(clean, plain(clean))
    assert float((share == 0).float().mean()) > 0.5
    assert torch.equal(gated(clean)[share == 0], clean[share == 0])
    assert not torch.equal(plain(clean), clean)
    assert torch.equal(gated(attacked), plain(attacked))
    # What was let through doesn't hide what was found.
    both = torch.cat([clean, attacked])
    assert torch.equal(gated.score(both), plain.score(both))
    assert torch.equal(gated.judge(both, gated(both)), plain.score(both))


def test_a_gate_opens_linearly_below_the_threshold_and_has_a_gradient() -> None:
    detector = Detector((1.0, 0.0, 0.0, 0.0), 0.0, 0.01, 0.01)  # the logit is the log RMS of what was removed
    purified = torch.full((5, 3, 8, 8), 0.5)
    at = torch.tensor(0.01 / 0.99).log()
    sizes = torch.stack([at - 2 * RAMP, at - RAMP, at - RAMP / 2, at, at + RAMP]).exp()
    images = (purified + sizes.view(-1, 1, 1, 1)).requires_grad_()
    share = detector.gate_share(images, purified)
    assert share.tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=0.02)
    share[2].backward()
    assert images.grad is not None
    assert float(images.grad[2].abs().min()) > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": ()}, "held-out pairs"),
        ({"photographs": "no-such-folder"}, "holds no images"),
        ({"clean": 20}, "draw more"),
        ({"rate": 0.0}, "draw more"),
    ],
)
def test_calibration_refuses_impossible_settings(
    changes: dict[str, object], words: str, weights: Path, tmp_path: Path
) -> None:
    values = {"pairs": (str(bank(tmp_path / "bank", 1)),), "clean": 400, **changes}
    with pytest.raises(CodefendError, match=words):
        calibrate(weights, CalibrateConfig(**values))  # type: ignore[arg-type]


def test_the_banks_of_the_training_are_refused(weights: Path, tmp_path: Path) -> None:
    place = bank(tmp_path / "bank", 1)
    trained = {"pairs": [{"config": runs.read_config(place)}]}
    (weights / "training.json").write_text(json.dumps(trained))
    with pytest.raises(CodefendError, match="another seed"):
        calibrate(weights, CalibrateConfig(pairs=(str(place),)))


def test_a_damaged_detector_is_an_error(weights: Path) -> None:
    config = json.loads((weights / "config.json").read_text())
    for detector in ({"weights": [1, 2]}, {"weights": [1, 2], "bias": 0, "threshold": 0, "false_positive_rate": 0}):
        (weights / "config.json").write_text(json.dumps({**config, "detector": detector}))
        with pytest.raises(CodefendError, match="calibrate"):
            purifiers.load(weights)
