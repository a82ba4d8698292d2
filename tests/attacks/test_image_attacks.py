"""What is special about the attacks with a bound of their own, those made to transfer, and the corruptions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from attacks_kit import ANSWERS, PROMPTS, CallCounter, ToyVictim, pictures
from codefend.attacks.bounds import excess, quantize_attacked
from codefend.attacks.corruptions import KINDS, Corruption, corrupt
from codefend.attacks.dct import dct_matrix
from codefend.attacks.objectives import Ensemble, features_towards, untargeted
from codefend.attacks.patch import AdversarialPatch
from codefend.attacks.pgd import PGD
from codefend.attacks.ssa_cwa import SSACWA, simulate_spectrum
from codefend.attacks.stadv import StAdv, roughness, warp
from codefend.contrib.attacks.colour import ciede2000, lab
from codefend.contrib.attacks.perc_al import PerCAL, colour_distance, shrink
from codefend.contrib.attacks.pureproof import PureProof, shipped_prior
from codefend.types import Budget, CodefendError, Objective


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def objective_of(victim: ToyVictim | None = None) -> Objective:
    return untargeted(victim or ToyVictim(), PROMPTS, ANSWERS)


# SSA-CWA


def test_dct_is_orthonormal_and_finds_a_cosine() -> None:
    matrix = dct_matrix(8, torch.zeros(1, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(8, dtype=torch.float64), atol=1e-12)
    wave = torch.cos(torch.pi / 8 * (torch.arange(8).double() + 0.5) * 3)
    assert torch.allclose(matrix @ wave, 2 * torch.eye(8, dtype=torch.float64)[3], atol=1e-12)


def test_spectrum_is_the_picture_without_mask_and_noise() -> None:
    images = pictures(2, 12)
    assert torch.allclose(simulate_spectrum(images, 0.0, 0.0, seeded()), images, atol=1e-5)
    moved = simulate_spectrum(images, 0.0, 0.5, seeded())
    gain = (dct_matrix(12, images) @ moved @ dct_matrix(12, images).T) / (
        dct_matrix(12, images) @ images @ dct_matrix(12, images).T
    )
    assert gain.median() == pytest.approx(1.0, abs=0.05)
    assert ((gain > 0.49) & (gain < 1.51)).float().mean() > 0.99  # up to rounding where the spectrum is near 0


def test_ssa_cwa_visits_every_model_and_fools_all() -> None:
    clean = pictures()
    models = [CallCounter(objective_of(ToyVictim(seed))) for seed in range(3)]
    adv = SSACWA(samples=2, rel_step=0.2)(Ensemble(models), clean, Budget("linf", 8 / 255, 8), generator=seeded())
    # Clean image, one look per step, and two samples per step for each part.
    assert [model.calls for model in models] == [1 + 8 + 8 * 2] * 3
    assert all((model(adv) < model(clean)).all() for model in models)


# PureProof


class Blur:
    """A denoiser that keeps only 4 x 4 means: what is finer than that never reaches the victim."""

    def __call__(self, images: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        return interpolate(avg_pool2d(images, 4), scale_factor=4)


def test_pureproof_survives_the_purifier_that_undoes_pgd() -> None:
    clean, net = pictures(), Blur()
    aim = features_towards(ToyVictim(), 1 - clean)
    zero = torch.zeros(3)
    budget = Budget("linf", 16 / 255, 20)
    proof = PureProof(denoiser=net, samples=3, renoised=1, rel_step=0.15)(aim, clean, budget, generator=seeded())
    plain = PGD()(aim, clean, budget, generator=seeded())
    before, survived, undone = (aim(net(x, zero, zero)) for x in (clean, proof, plain))
    assert aim(plain).mean() < aim(proof).mean()  # without a purifier plain steps are better
    assert (survived < before - 0.01).all()
    assert survived.mean() < undone.mean() - 0.01


def test_pureproof_uses_the_shipped_prior_at_any_size() -> None:
    clean = pictures(3, 13)
    calls: list[torch.Size] = []

    def aim(images: Tensor) -> Tensor:
        calls.append(images.shape)
        return images.flatten(1).mean(1)

    adv = PureProof(samples=2, renoised=1)(aim, clean, Budget("linf", 8 / 255, 4), generator=seeded())
    assert set(calls) == {clean.shape}
    assert (aim(adv) < aim(clean)).all()
    assert not any(p.requires_grad or p.grad is not None for p in shipped_prior().parameters())  # type: ignore[attr-defined]


# StAdv


def test_warp_moves_pixels_right_and_down() -> None:
    images, flow = pictures(2, 8), torch.zeros(2, 2, 8, 8)
    assert torch.allclose(warp(images, flow), images, atol=1e-5)
    flow[:, 0] = 1
    assert torch.allclose(warp(images, flow)[..., :-1], images[..., 1:], atol=1e-5)
    flow[:, 0], flow[:, 1] = 0, 2
    assert torch.allclose(warp(images, flow)[..., :-2, :], images[..., 2:, :], atol=1e-5)


def test_roughness_is_zero_for_a_shift_and_counts_a_step() -> None:
    flow = torch.full((1, 2, 4, 4), 0.7)
    assert float(roughness(flow)) == pytest.approx(0.0, abs=1e-5)
    flow[:, 0, :, 2:] += 3.0  # one column of four steps of 3, of 12 pairs
    assert float(roughness(flow)) == pytest.approx(1.0, abs=1e-4)


def test_stadv_smooths_its_flow_and_knows_its_bound() -> None:
    clean, objective = pictures(), objective_of()
    budget = Budget(steps=15)
    rough = StAdv(limit=0.1, tau=0.0)(objective, clean, budget)
    smooth = StAdv(limit=0.1, tau=5.0)(objective, clean, budget)
    assert objective(rough).mean() < objective(smooth).mean() < objective(clean).mean()
    attack = StAdv(limit=0.1)
    assert excess(attack, rough, clean, budget).max() == 0
    assert (attack.outside((clean + 0.3).clamp(0, 1), clean) > 0).any()
    assert torch.allclose(warp(clean, torch.zeros(3, 2, 16, 16)), StAdv(limit=0.0)(objective, clean, budget), atol=1e-5)


# Colour

# (L, a, b) pairs and their CIEDE2000 from Sharma, Wu & Dalal 2005, Table 1
PAIRS = [
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, 3.1571, -77.2803), (50, 0, -82.7485), 2.8615),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
    ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
    ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


@pytest.mark.parametrize(("first", "second", "expected"), PAIRS)
def test_ciede2000_is_the_standards(first: tuple[float, ...], second: tuple[float, ...], expected: float) -> None:
    a, b = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (first, second))
    assert float(ciede2000(a, b)) == pytest.approx(expected, abs=1e-4)
    assert float(ciede2000(b, a)) == pytest.approx(expected, abs=1e-4)


def test_colours_agree_with_scikit_image() -> None:
    color = pytest.importorskip("skimage.color")
    first = pictures(1, 24).double()
    second = (first + 0.1 * torch.randn(first.shape, generator=seeded(), dtype=torch.float64)).clamp(0, 1)
    theirs = [color.rgb2lab(x[0].permute(1, 2, 0).numpy()) for x in (first, second)]
    assert torch.allclose(lab(first)[0].permute(1, 2, 0), torch.from_numpy(theirs[0]), atol=0.02)
    expected = torch.from_numpy(color.deltaE_ciede2000(*theirs))
    assert torch.allclose(ciede2000(lab(first), lab(second))[0], expected, atol=0.02)


def test_colour_has_a_finite_slope_at_grey_black_and_no_difference() -> None:
    for level in (0.0, 0.5, 1.0):
        images = torch.full((1, 3, 2, 2), level, requires_grad=True)
        for other in (torch.full_like(images, level), pictures(1, 2)):
            (grad,) = torch.autograd.grad(ciede2000(lab(images), lab(other)).sum(), images)
            assert grad.isfinite().all()


def test_perc_al_spends_its_bound_and_no_more() -> None:
    clean, objective = pictures(), objective_of()
    losses = []
    for limit in (1.0, 4.0):
        attack = PerCAL(limit=limit, step_size=8 / 255)
        adv = attack(objective, clean, Budget(steps=20), generator=seeded())
        found = colour_distance(adv, clean)
        assert (found <= limit + 1e-4).all()
        assert (found > 0.3 * limit).all()
        assert excess(attack, quantize_attacked(attack, adv, clean, Budget()), clean, Budget()).max() == 0
        losses.append(objective(adv))
    assert (losses[1] < losses[0]).all()
    assert (PerCAL(limit=1.0).outside(adv, clean) > 0).any()


def test_shrink_reaches_the_bound_from_outside() -> None:
    clean = pictures()
    far = (clean + 0.2 * torch.randn(clean.shape, generator=seeded())).clamp(0, 1)
    found = colour_distance(shrink(far, clean, 2.0), clean)
    assert ((found <= 2.0) & (found > 1.95)).all()
    assert torch.equal(shrink(far, clean, 1e3), far)


# AdversarialPatch and bounds


def test_patch_knows_its_bound() -> None:
    clean, attack = pictures(), AdversarialPatch(side=0.25)
    one, two = clean.clone(), clean.clone()
    one[:, :, 3:7, 5:9] = 1 - one[:, :, 3:7, 5:9]
    two[:, :, 3, 2] = 1 - two[:, :, 3, 2]
    two[:, :, 3, 9] = 1 - two[:, :, 3, 9]
    assert attack.outside(clean, clean).tolist() == [0, 0, 0]
    assert attack.outside(one, clean).tolist() == [0, 0, 0]
    assert attack.outside(two, clean).tolist() == [4, 4, 4]  # 8 wide, 4 allowed


def test_excess_sees_every_kind_of_fault() -> None:
    clean, budget = pictures(), Budget("linf", 8 / 255)
    assert excess(PGD(), clean, clean, budget).tolist() == [0, 0, 0]
    broken = clean.clone()
    broken[0, 0, 0, 0], broken[1, 0, 0, 0], broken[2, 0, 0, 0] = float("nan"), 1.5, (clean[2, 0, 0, 0] + 0.5) % 1
    found = excess(PGD(), broken, clean, budget)
    assert found[0] == torch.inf
    assert found[1] >= 0.5
    assert found[2] == pytest.approx(0.5 - 8 / 255, abs=1e-5)


# Corruptions


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_grow_with_severity_and_stay_pictures(kind: str) -> None:
    images = interpolate(pictures(2, 16), scale_factor=4, mode="bilinear")
    levels = [corrupt(images, kind, severity, generator=seeded()) for severity in range(1, 6)]
    assert all(x.shape == images.shape and x.min() >= 0 and x.max() <= 1 for x in levels)
    damage = [float((x - images).square().mean()) for x in levels]
    assert damage[0] > 0
    # Saturation first falls and then rises; small pictures cannot tell the blurs of neighbouring levels apart.
    assert damage[4] >= damage[0] or kind == "saturate"
    assert torch.equal(corrupt(images, kind, 3, generator=seeded()), levels[2])


def test_brightness_and_saturation_do_what_hsv_says() -> None:
    colour = torch.tensor([0.6, 0.3, 0.15]).view(1, 3, 1, 1)
    brighter = corrupt(colour, "brightness", 2)  # value 0.6 -> 0.8, hue and saturation kept
    assert torch.allclose(brighter.flatten(), torch.tensor([0.8, 0.4, 0.2]), atol=1e-5)
    duller = corrupt(colour, "saturate", 1)  # saturation 0.75 -> 0.225
    assert torch.allclose(
        duller.flatten(), torch.tensor([0.6, 0.6 * (1 - 0.225 * 2 / 3), 0.6 * (1 - 0.225)]), atol=1e-5
    )


def test_blur_keeps_a_flat_picture() -> None:
    flat = torch.full((1, 3, 20, 20), 0.3)
    for kind in ("gaussian-blur", "defocus-blur", "motion-blur", "pixelate"):
        assert torch.allclose(corrupt(flat, kind, 5), flat, atol=1e-5)


def test_one_corruption_is_no_choice_and_the_worst_is() -> None:
    clean, objective = pictures(), objective_of()
    single = Corruption(kind="contrast")(objective, clean, Budget(), generator=seeded())
    assert torch.equal(single, corrupt(clean, "contrast", 3))
    worst = objective(Corruption()(objective, clean, Budget(), generator=seeded()))
    assert (worst <= objective(single) + 1e-6).all()
    assert (worst <= objective(clean) + 1e-6).all()


@pytest.mark.parametrize(("kind", "severity"), [("snow", 1), ("contrast", 6)])
def test_unknown_corruption_is_said_in_one_line(kind: str, severity: int) -> None:
    with pytest.raises(CodefendError, match="severity 1 to 5"):
        corrupt(pictures(), kind, severity)
