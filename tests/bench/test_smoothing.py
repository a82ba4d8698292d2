"""Certificates: the bound and the radius against closed forms, attacks inside the radius, and the conditions."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import NormalDist

import pytest
import torch
from torch import Generator, Tensor

from codefend import Budget, Defense, certify, load_purifier
from codefend.attacks.pgd import PGD
from codefend.bench.smoothing import SmoothedVictim, certificates, lower_bound, naming
from codefend.core.seeds import noise_like
from codefend.purifiers.base import Purifier
from codefend.purifiers.shallow import Identity
from codefend.types import CodefendError
from toys import Noise

SIGMA = 0.25
QUESTION = "Which side?"


class Linear:
    """Says on which side of a plane the image lies."""

    name, greedy = "linear", True

    def __init__(self, weights: Tensor, offset: float) -> None:
        self.weights, self.offset = weights, offset

    def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["The left." if m > 0 else "right" for m in self.margins(images).tolist()]

    def margins(self, images: Tensor) -> Tensor:
        return (images * self.weights).sum((1, 2, 3)) + self.offset


class Curved(Linear):
    """A small network in its place."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = (torch.randn(n, generator=generator) for n in ((192, 16), (16,)))

    def margins(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5).matmul(self.first).div(4).tanh().matmul(self.second)


def image(seed: int) -> Tensor:
    return torch.rand(3, 8, 8, generator=gen(seed))


def gen(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


DEFENSE = Defense(Noise(SIGMA), name="noise")


@pytest.mark.parametrize(
    ("hits", "draws", "alpha"), [(90, 100, 0.05), (51, 100, 0.001), (7, 10, 0.01), (999, 1000, 0.001)]
)
def test_at_the_lower_bound_so_many_hits_have_probability_alpha(hits: int, draws: int, alpha: float) -> None:
    p = lower_bound(hits, draws, alpha)
    tail = sum(comb(draws, k) * p**k * (1 - p) ** (draws - k) for k in range(hits, draws + 1))
    assert tail == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize(("draws", "sigma", "radius"), [(100, 0.15, 0.225), (1000, 0.15, 0.369), (1000, 0.25, 0.615)])
def test_the_radius_of_a_unanimous_vote(draws: int, sigma: float, radius: float) -> None:
    assert lower_bound(draws, draws, 0.001) == pytest.approx(0.001 ** (1 / draws), abs=1e-9)
    (certificate,) = certificates(["a"], ["a"] * draws, {"": str}, 0.001, sigma).values()
    assert certificate.radius == pytest.approx(radius, abs=1e-3)


def test_no_hits_bound_nothing() -> None:
    assert lower_bound(0, 10, 0.01) == 0


@pytest.mark.parametrize("distance", [0.1, 0.3, 0.5])
def test_the_radius_for_a_plane_is_the_distance_from_it_less_what_the_sample_leaves_open(distance: float) -> None:
    weights = torch.randn(3, 8, 8, generator=gen(5))
    x = image(0)
    offset = float(distance * weights.norm() - (x * weights).sum())
    certificate = certify(Linear(weights, offset), DEFENSE, x, QUESTION, samples=20_000, batch=2000, generator=gen())
    assert certificate.says == "left"
    assert 0.85 * distance < certificate.radius < distance
    exact = SIGMA * NormalDist().inv_cdf(certificate.hits / certificate.draws)
    assert exact == pytest.approx(distance, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_no_attack_inside_the_radius_changes_a_certified_answer(seed: int) -> None:
    """The attacker knows the smoothed victim and averages its gradient over the noise."""
    victim, x = Curved(), image(seed)
    certificate = certify(victim, DEFENSE, x, QUESTION, samples=2000, batch=500, generator=gen(seed))
    assert not certificate.abstains
    sign = 1 if certificate.says == "left" else -1
    noise = gen(100 + seed)

    def objective(images: Tensor) -> Tensor:
        noisy = images[:, None] + SIGMA * torch.randn(len(images), 64, 3, 8, 8, generator=noise)
        return sign * victim.margins(noisy.flatten(0, 1)).view(len(images), 64).mean(1)

    for share, flips in ((0.999, False), (6.0, True)):  # six radii away the same attack succeeds
        budget = Budget(norm="l2", eps=share * certificate.radius, steps=40)
        (attacked,) = PGD()(objective, x[None], budget, generator=gen(seed))
        answers = SmoothedVictim(victim, DEFENSE).draw(attacked, QUESTION, 4000, batch=500, generator=gen(9))
        agree = sum(answer == {"left": "The left.", "right": "right"}[certificate.says] for answer in answers)
        assert (agree < 2000) == flips


def test_an_answer_that_half_of_the_draws_give_is_not_certified() -> None:
    weights = torch.ones(3, 8, 8)
    x = image(0)
    certificate = certify(Linear(weights, -float(x.sum())), DEFENSE, x, QUESTION, samples=500, generator=gen())
    assert certificate.abstains
    assert certificate.radius == 0


def test_the_confidence_is_shared_between_the_objects_of_a_caption() -> None:
    captions = ["a red car and a dog"] * 90 + ["a car"] * 10
    found = certificates(captions, captions, naming(["car", "dog", "cat"]), 0.003, SIGMA)
    assert [found[name].says for name in ("car", "dog", "cat")] == ["yes", "yes", "no"]
    assert found["dog"].lower == lower_bound(90, 100, 0.001)
    assert found["car"].radius == found["cat"].radius > found["dog"].radius > 0


def test_the_answers_that_choose_are_not_those_that_count() -> None:
    found = certificates(["b", "b", "a"], ["a"] * 90 + ["b"] * 10, {"": str}, 0.001, SIGMA)[""]
    assert (found.says, found.hits, found.abstains) == ("b", 10, True)


def test_a_purifier_without_noise_certifies_nothing() -> None:
    for defense in (Defense(None), Defense(Identity()), Defense(load_purifier("jpeg"))):
        with pytest.raises(CodefendError, match="noise"):
            certify(Curved(), defense, image(0), QUESTION)


def test_a_vote_is_not_certified_again() -> None:
    with pytest.raises(CodefendError, match="without votes"):
        SmoothedVictim(Curved(), Defense(load_purifier("bridge:sigma=0.1"), votes=3))


def test_noise_after_the_first_is_refused() -> None:
    with pytest.raises(CodefendError, match="steps=1"):
        SmoothedVictim(Curved(), Defense(load_purifier("diffpure:t=0.05,steps=3")))
    for spec in ("diffpure:t=0.05,steps=1", "diffpure:t=0.05,steps=3,eta=0"):
        SmoothedVictim(Curved(), Defense(load_purifier(spec)))


def test_a_victim_that_does_not_declare_greedy_answers_is_refused() -> None:
    victim = Curved()
    victim.greedy = False
    with pytest.raises(CodefendError, match="greedy"):
        certify(victim, DEFENSE, image(0), QUESTION)


def test_a_purifier_that_is_not_a_function_of_the_noisy_image_is_refused() -> None:
    class Restless(Noise):
        def behind_noise(self) -> Purifier:
            rest = Noise(SIGMA)
            rest.stochastic = False
            return rest

    with pytest.raises(CodefendError, match="deterministic"):
        certify(Curved(), Defense(Restless(SIGMA)), image(0), QUESTION)


@pytest.mark.parametrize(
    "spec", ["bridge:sigma=0.1,strength=1", "bridge:sigma=0.1,strength=1,evaluations=2", "diffpure:t=0.05,steps=1"]
)
def test_noise_and_what_follows_it_are_the_purifier(spec: str) -> None:
    purifier = load_purifier(spec)
    images = torch.rand(2, 3, 32, 32, generator=gen())
    noisy = images + purifier.noise * noise_like(images, gen(3))
    with torch.no_grad():
        assert torch.equal(purifier.behind_noise()(noisy), purifier(images, generator=gen(3)))


def test_no_change_is_scaled_behind_noise() -> None:
    """A strength above 1 would give back some of the noise, and below it would need the image without noise."""
    noisy = torch.rand(1, 3, 32, 32, generator=gen())
    plain, scaled = (load_purifier(f"bridge:sigma=0.1,strength={s}").behind_noise() for s in (1, 1.15))
    with torch.no_grad():
        assert torch.equal(plain(noisy), scaled(noisy))


def test_the_gate_sees_the_noisy_image_only() -> None:
    purifier = load_purifier("bridge:gate=true")
    rest = purifier.behind_noise()
    clean = torch.full((1, 3, 32, 32), 0.5)
    noisy = clean + purifier.noise * noise_like(clean, gen(3))
    with torch.no_grad():
        assert purifier.detector is not None
        share = purifier.detector.gate_share(noisy, rest.transformed(noisy))
        expected = torch.lerp(noisy, rest.transformed(noisy), share.view(-1, 1, 1, 1))
        assert torch.allclose(rest(noisy), expected)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"samples": 5}, "certify nothing"),
        ({"alpha": 1.5}, "alpha"),
        ({"batch": 0}, "batch"),
        ({"selection": 0}, "sel"),
    ],
)
def test_numbers_that_certify_nothing_are_refused(options: dict[str, float], problem: str) -> None:
    with pytest.raises(CodefendError, match=problem):
        certify(Curved(), DEFENSE, image(0), QUESTION, **options)


def test_the_victim_runs_in_the_precision_of_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codefend.core.devices._multiplies_bfloat16", lambda: True)
    monkeypatch.delenv("CODEFEND_PRECISION", raising=False)
    seen = []

    class Probe(Linear):
        def generate(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return ["left"] * len(images)

    for mixed in (False, True):
        SmoothedVictim(Probe(torch.ones(3, 8, 8), 0), DEFENSE, mixed=mixed).draw(
            image(0), QUESTION, 2, batch=2, generator=gen()
        )
    assert seen == [torch.float32, torch.bfloat16]
