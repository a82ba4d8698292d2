"""Guidance: steps away from the attacked image's features, local, bounded, exact in their gradient, and worth it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codefend import encoders, purifiers
from codefend.attacks.objectives import features_away
from codefend.attacks.pgd import PGD
from codefend.bench.craft import evasive_objective
from codefend.purifiers import grid, guidance
from codefend.purifiers.base import Purifier
from codefend.purifiers.guidance import Guidance
from codefend.purifiers.onnx_export import export_onnx
from codefend.training.calibrate import _features
from codefend.types import Budget, CodefendError

LEVEL = 1 / 255


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells(images: Tensor) -> Tensor:
    """A look whose features are smooth functions of cells of 16 pixels, and so know nothing of what is further off."""
    projection = torch.randn(24, 3 * 16 * 16, generator=gen(9)).to(images)
    unfolded = F.unfold(images - 0.5, 16, stride=16).transpose(1, 2)  # [B, places, 768]
    return (unfolded @ projection.T).tanh() + 0.1


def scene(count: int = 2, height: int = 64, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Clean, attacked (8/255, in the features' own direction), and purified images that keep a third of it."""
    clean = F.interpolate(torch.rand(count, 3, height // 8, width // 8, generator=gen(1)), (height, width)) * 0.6 + 0.2
    start = (clean + torch.randn(clean.shape, generator=gen(2)) * LEVEL).requires_grad_()
    likeness = F.cosine_similarity(cells(start), cells(clean), dim=-1).sum()
    (slope,) = torch.autograd.grad(likeness, start)
    attacked = clean - 8 * LEVEL * slope.sign()
    return clean, attacked, attacked + 0.67 * (clean - attacked)


def test_features_move_away_from_the_attack_and_back_to_clean() -> None:
    clean, attacked, purified = scene()
    moved = Guidance(0.3, [cells])(attacked, purified)
    for other, way in ((attacked, -1), (clean, 1)):
        before, after = (F.cosine_similarity(cells(x), cells(other), dim=-1).mean() for x in (purified, moved))
        assert way * (after - before) > 0


def test_a_pixel_moves_by_no_more_than_its_share_of_the_removed_part() -> None:
    _, attacked, purified = scene()
    purified[:, :, :32] = attacked[:, :, :32]  # here nothing was
    moved = Guidance(0.3, [cells])(attacked, purified) - purified
    taken = F.avg_pool2d((attacked - purified).square().mean(1, keepdim=True), 15, 1, 7, count_include_pad=False)
    assert bool((moved.abs() <= 0.3 * taken.sqrt() + 1e-6).all())
    assert float(moved[:, :, :24].abs().max()) < 1e-6
    assert float(moved[:, :, 40:].abs().max()) > 0.2 * 0.67 * 8 * LEVEL


def test_guidance_of_an_image_does_not_depend_on_its_batch_or_on_earlier_calls() -> None:
    _, attacked, purified = scene(3)
    guide = Guidance(0.2, [cells])
    together = guide(attacked, purified)
    assert torch.equal(guide(attacked, purified), together)
    assert torch.allclose(guide(attacked[1:2], purified[1:2]), together[1:2], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_size_and_precision(dtype: torch.dtype) -> None:
    _, attacked, purified = scene(1, 64, 96)
    moved = Guidance(0.2, [cells])(attacked[..., :37, :53].to(dtype), purified[..., :37, :53].to(dtype))
    assert moved.shape == (1, 3, 37, 53)
    assert moved.dtype == dtype
    assert bool(moved.isfinite().all())


def test_tiles_are_guided_as_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    _, attacked, purified = scene(1, 288, 416)
    guide = Guidance(0.3, [cells])
    whole = guide(attacked, purified)
    monkeypatch.setattr(grid, "TILED_ABOVE", 1)
    monkeypatch.setattr(grid, "TILE", 224)
    assert len(list(grid.boxes(288, 416))) == 6
    tiled = guide(attacked, purified)
    assert float((tiled - whole).abs().max()) < 1e-5
    monkeypatch.setattr(guidance, "PERIOD", 255)  # the noise then starts elsewhere in every tile
    guidance._pattern.cache_clear()
    monkeypatch.setattr(guidance, "_noise", lambda h, w, top, left: guidance._pattern()[:, :, :h, :w])
    assert float((guide(attacked, purified) - whole).abs().max()) > 1e-4
    guidance._pattern.cache_clear()


def test_the_gradient_is_exact() -> None:
    _, attacked, purified = scene(1, 32, 32)
    attacked, purified = attacked.double(), purified.double().requires_grad_()
    attacked.requires_grad_()
    guide = Guidance(0.3, [cells])
    weights = torch.randn(attacked.shape, generator=gen(4)).double()
    gradients = torch.autograd.grad((guide._move(attacked, purified) * weights).sum(), (attacked, purified))
    for which, slope in enumerate(gradients):
        step = torch.randn(attacked.shape, generator=gen(5 + which)).double() * 1e-6
        ends = []
        for sign in (1, -1):
            shifted = [attacked.detach(), purified.detach()]
            shifted[which] = shifted[which] + sign * step
            ends.append((guide._move(*shifted) * weights).sum())
        assert float((slope * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_serving_needs_no_gradient_and_leaves_none(mode: type) -> None:
    _, attacked, purified = scene(1)
    guide = Guidance(0.2, [cells])
    expected = guide(attacked, purified)
    with mode():
        moved = guide(attacked, purified)
    assert torch.equal(moved, expected)
    assert not moved.requires_grad


def test_a_purifier_loaded_for_inference_is_guided_as_any_other(tmp_path: Path) -> None:
    """Also with a guide named twice; and what goes along to another process is small."""
    images = (torch.rand(1, 3, 32, 48, generator=gen()) * 0.9).clamp(0, 1)
    expected = purifiers.load("bridge-detail:guided=0.2")(images)
    encoders.shared.cache_clear()
    try:
        with torch.inference_mode():
            assert torch.allclose(purifiers.load("bridge-detail:guided=0.2")(images), expected, atol=1e-2)
        again = purifiers.load("bridge-detail:guided=0.2,guides=lite0 + lite2+lite0")
        assert len(pickle.dumps(again.guidance)) < 1000  # names go along, no encoders
        assert torch.equal(again(images), expected)
        assert again.multiply_adds(64, 64) == purifiers.load("bridge-detail:guided=0.2").multiply_adds(64, 64)
    finally:
        encoders.shared.cache_clear()


def test_a_thin_strip_counts_with_its_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels: list[int] = []

    def counted(images: Tensor) -> Tensor:
        pixels.append(images[:, 0].numel())
        return cells(images)

    monkeypatch.setattr(grid, "TILED_ABOVE", 40_000)
    strips = torch.rand(3, 3, 1, 900, generator=gen())
    assert Guidance(0.2, [counted])(strips, strips * 0.98).shape == strips.shape
    assert max(pixels) == 32 * 928  # one at a time


def crops() -> Tensor:
    from skimage import data

    whole = torch.from_numpy(data.chelsea().copy()).permute(2, 0, 1)[None].float() / 255
    views = [F.interpolate(whole[..., :256, left : left + 256], (128, 128), mode="area") for left in (40, 160)]
    return torch.cat(views)


def test_a_bridge_restores_more_for_an_encoder_that_guides_nothing() -> None:
    clean, judge = crops(), encoders.shared("lite1")

    class JudgeFeatures:
        def features(self, images: Tensor) -> Tensor:
            return judge(images)

    budget = Budget(eps=8 * LEVEL, steps=10)
    attacked = PGD()(features_away(JudgeFeatures(), clean), clean, budget, generator=gen())
    cosines = {}
    for label in ("bridge-detail", "bridge-detail:guided=0.2", "bridge-detail:guided=0.2,guides=lite1"):
        with torch.no_grad():
            purified = purifiers.load(label)(attacked)
            cosines[label] = float(F.cosine_similarity(judge(purified), judge(clean), dim=-1).mean())
    plain, guided, own = cosines.values()
    assert plain + 0.01 < guided < own


def test_the_detector_compares_images_before_guidance() -> None:
    plain, guided, gated = (
        purifiers.load(f"bridge-detail{options}") for options in ("", ":guided=0.2", ":guided=0.2,gate=true")
    )
    clean = crops()
    attacked = (clean + 8 * LEVEL * torch.randn(clean.shape, generator=gen(3)).sign()).clamp(0, 1)
    assert guided.detector == gated.detector == plain.detector is not None
    with torch.no_grad():
        assert torch.allclose(guided.judge(attacked, guided(attacked)), plain.judge(attacked, plain(attacked)))
        both = torch.cat([clean, attacked])
        share = guided.detector.gate_share(both, plain(both))
        assert share[2:].tolist() == [1, 1]
        assert float(share[:2].max()) < 0.5
        expected = torch.lerp(both, guided(both), share.view(-1, 1, 1, 1))
        assert torch.allclose(gated(both), expected, atol=1e-5)
        assert torch.equal(_features(guided, both, 0), _features(plain, both, 0))  # what `codefend calibrate` fits
        assert not torch.allclose(expected[2:], plain(attacked), atol=1e-3)


def test_the_penalty_for_detection_is_the_same_with_guidance() -> None:
    """Its fine is that of the purifier without guidance, to the last digit."""
    attacked = (crops() + 8 * LEVEL * torch.randn(2, 3, 128, 128, generator=gen(3)).sign()).clamp(0, 1)

    def nothing(images: Tensor) -> Tensor:
        return images.flatten(1).sum(1) * 0

    fines = []
    for label in ("bridge-detail", "bridge-detail:guided=0.2"):
        purifier: Purifier = purifiers.load(label)
        with torch.no_grad():
            fines.append(evasive_objective(nothing, purifier, attacked, 1.0, None)(attacked))
        assert (purifier.guidance is None) == (label == "bridge-detail")  # a copy lost it
    assert float(fines[0].min()) > 0
    assert torch.equal(*fines)


@dataclass(frozen=True)
class Wrong:
    options: str
    words: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("guided=2", "0 to 1"),
        Wrong("guided=-0.1", "0 to 1"),
        Wrong("guided=nan", "finite"),
        Wrong("guided=0.2,guides=lite9", "lite9"),
        Wrong("guided=0.2,guides=", "unknown encoder"),
        Wrong("guides=lite0+lite9", "lite9"),
    ],
)
def test_wrong_options_are_errors(wrong: Wrong) -> None:
    with pytest.raises(CodefendError, match=wrong.words):
        purifiers.load(f"bridge:{wrong.options}")


def test_its_work_is_counted_and_it_is_not_exported(tmp_path: Path) -> None:
    plain, guided = purifiers.load("bridge-detail"), purifiers.load("bridge-detail:guided=0.2")
    extra = guided.multiply_adds(224, 224) - plain.multiply_adds(224, 224)
    forth = sum(encoders.shared(name).local_multiply_adds for name in ("lite0", "lite2")) * 224**2
    assert extra == pytest.approx(9 * forth, rel=1e-3)  # the attacked image once, then four times there and back
    assert 0.2e9 < forth < 1.5e9
    with pytest.raises(CodefendError, match="guidance"):
        export_onnx("bridge-detail:guided=0.2", f"{tmp_path}/x.onnx")
