"""Every attack of the table fulfils one contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attacks_kit import (
    ANSWERS,
    BUDGETS,
    PROMPTS,
    Noisy,
    ToyVictim,
    both_norms,
    make_objective,
    sample_images,
    seeded,
    setup,
)
from codefend.attacks import ATTACKS, AttackSpec
from codefend.attacks.apgd import APGD
from codefend.attacks.base import Trace
from codefend.attacks.corruptions import RandomNoise
from codefend.attacks.cw import CW
from codefend.attacks.mifgsm import MIFGSM
from codefend.attacks.norms import OwnBound, distance, excess, quantize_attacked
from codefend.attacks.objectives import untargeted
from codefend.attacks.pgd import PGD
from codefend.defense import DefendedVictim, Defense
from codefend.types import Budget, Objective

# Averages of many samples, or a side of 15% of 16 pixels, would be slow or weak on toys.
OPTIONS: dict[str, dict[str, Any]] = {
    "ssa-cwa": {"samples": 4, "rel_step": 0.2},
    "pureproof": {"samples": 4, "renoised": 1, "rel_step": 0.2, "denoiser": lambda x, s, sigma: 0.1 + 0.8 * x},
    "mf-tt": {"sigma": 32 / 255},  # as its budget here
    "patch": {"side": 0.4},
    "patch-targeted": {"side": 0.4},
    "perc-al": {"limit": 6.0, "step_size": 8 / 255},
    "stadv": {"limit": 0.1},
}
SHARED = ("universal",)  # one perturbation for a batch: single examples may lose
AUGMENTED = (
    "dim",
    "ssa-cwa",
    "pureproof",
    "stadv",
    "low-frequency",
)  # no gradient at the image itself
every_attack = pytest.mark.parametrize("spec", ATTACKS.values(), ids=lambda spec: spec.name)
# eps and norm mean nothing to an attack with its own bound.
every_case = pytest.mark.parametrize(
    ("spec", "norm", "victim"),
    [
        (spec, norm, victim)
        for spec in ATTACKS.values()
        for norm, victim in (("linf", "bare"), ("linf", "defended"), ("l2", "defended"))
        if spec.bound == "ball" or norm == "linf"
    ],
    ids=lambda value: getattr(value, "name", value),
)


def budget_of(spec: AttackSpec, norm: str) -> Budget:
    base = BUDGETS[norm]
    if spec.goal.startswith("answer"):  # an answer changes in steps: small moves say nothing
        return Budget(base.norm, 4 * base.eps, 100)
    return Budget(base.norm, base.eps, 80) if spec.threat == "score" else base


def built(spec: AttackSpec) -> Any:
    attack = spec.build()
    for key, value in OPTIONS.get(spec.name, {}).items():
        assert hasattr(attack, key)
        setattr(attack, key, value)
    return attack


@every_case
def test_every_attack_fulfils_the_contract(spec: AttackSpec, norm: str, victim: str) -> None:
    objective, clean = setup(spec, victim)
    budget, before, attack = budget_of(spec, norm), clean.clone(), built(spec)
    adv = attack(objective, clean, budget, generator=seeded())
    assert adv.shape == clean.shape
    assert adv.dtype == clean.dtype
    assert not adv.requires_grad
    assert torch.equal(clean, before)  # the input is left alone
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert isinstance(attack, OwnBound) == (spec.bound != "ball")
    if spec.bound == "ball":
        assert (distance(adv, clean, budget.norm) <= budget.eps + 1e-6).all()
    assert (excess(attack, adv, clean, budget) <= 1e-6).all()
    assert (excess(attack, quantize_attacked(attack, adv, clean, budget), clean, budget) <= 1e-6).all()
    if spec.name not in SHARED:
        assert (objective(adv) <= objective(clean) + 1e-6).all()
    assert torch.equal(adv, built(spec)(objective, clean, budget, generator=seeded()))
    if spec.threat != "control":
        assert_beats_noise(spec, objective(adv), objective(RandomNoise()(objective, clean, budget, generator=seeded())))


def assert_beats_noise(spec: AttackSpec, adv: Tensor, noise: Tensor) -> None:
    assert adv.mean() < noise.mean() - 1e-3
    if spec.name not in SHARED and spec.bound == "ball" and not spec.goal.startswith("answer"):
        assert (adv <= noise + 1e-4).all()


@every_attack
def test_zero_eps_returns_the_images(spec: AttackSpec) -> None:
    objective, clean = setup(spec)
    for norm in ("linf", "l2") if spec.bound == "ball" else ():
        assert torch.equal(built(spec)(objective, clean, Budget(norm, 0.0, 5)), clean)


@every_attack
def test_the_dtype_of_the_images_is_preserved(spec: AttackSpec) -> None:
    objective, clean = setup(spec, images=sample_images().double())
    assert built(spec)(objective, clean, Budget("linf", 8 / 255, 3), generator=seeded()).dtype == torch.float64


@pytest.mark.parametrize(
    "attack",
    [PGD(random_start=False), APGD(random_start=False), MIFGSM(), MIFGSM(nesterov=True), CW()],
    ids=lambda attack: f"{attack.name}-{getattr(attack, 'nesterov', '')}",
)
@both_norms
def test_an_example_does_not_depend_on_its_batch(attack: Any, norm: str) -> None:
    clean, order = sample_images(), [2, 0, 1]
    victim, budget = ToyVictim(), BUDGETS[norm]
    adv = attack(untargeted(victim, PROMPTS, ANSWERS), clean, budget)
    shuffled = attack(
        untargeted(victim, [PROMPTS[i] for i in order], [ANSWERS[i] for i in order]), clean[order], budget
    )
    alone = attack(untargeted(victim, PROMPTS[:1], ANSWERS[:1]), clean[:1], budget)
    assert torch.allclose(shuffled, adv[order], atol=1e-5)
    assert torch.allclose(alone, adv[:1], atol=1e-5)


@every_attack
def test_attacks_work_behind_a_randomized_defense(spec: AttackSpec) -> None:
    victim = DefendedVictim(ToyVictim(), Defense(purifier=Noisy(0.05), name="noisy"), generator=seeded())
    clean = sample_images()
    objective = make_objective(spec, victim, clean)
    base = budget_of(spec, "linf")
    adv = built(spec)(objective, clean, Budget("linf", base.eps, base.steps, eot=3), generator=seeded())

    def mean(images: Tensor) -> Tensor:
        return torch.stack([objective(images).detach() for _ in range(64)]).mean(0)

    gain = (mean(clean) - mean(adv)).mean()
    assert gain > (0.0 if spec.threat == "control" else 0.01)


@every_attack
def test_trace_records_every_step(spec: AttackSpec) -> None:
    objective, clean = setup(spec)
    trace, attack = Trace(), built(spec)
    assert trace.attach(attack)
    attack(objective, clean, budget_of(spec, "linf"), generator=seeded())
    assert trace.losses
    assert all(losses.shape == (3,) and losses.isfinite().all() for losses in trace.losses)
    if spec.threat == "white-box":
        assert len(trace.losses) >= BUDGETS["linf"].steps
        assert len(trace.gradient_norms) == len(trace.nonfinite) > 0
        assert (torch.stack(trace.gradient_norms)[1:] > 0).all()
        assert trace.zero_gradients().max() < 0.2
        assert not torch.stack(trace.nonfinite).any()
    else:
        assert trace.zero_gradients().isnan()


@pytest.mark.parametrize("spec", [s for s in ATTACKS.values() if s.threat == "white-box"], ids=lambda s: s.name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_gradients_are_counted_and_ignored(spec: AttackSpec, poison: float) -> None:
    clean = sample_images()
    mask = torch.zeros_like(clean)
    mask[0, :, :2] = 1  # 96 poisoned entries of the first example

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor) -> Tensor:
            return images.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.where(mask > 0, torch.full_like(grad, poison), grad)

    victim = ToyVictim()
    objective = untargeted(victim, PROMPTS, ANSWERS)
    poisoned: Objective = lambda images: objective(Poison.apply(images))  # type: ignore[no-untyped-call]  # noqa: E731
    trace, attack = Trace(), built(spec)
    trace.attach(attack)
    budget = BUDGETS["linf"]
    adv = attack(poisoned, clean, budget, generator=seeded())
    assert adv.isfinite().all()
    assert (objective(adv) < objective(clean)).all() or spec.name in SHARED
    if spec.name not in AUGMENTED:
        assert trace.nonfinite[0].tolist() == [96, 0, 0]


def test_nan_objective_never_wins_and_never_crashes() -> None:
    clean = sample_images()
    for spec in ATTACKS.values():
        adv = built(spec)(lambda x: x.flatten(1).sum(1) * math.nan, clean, Budget("linf", 8 / 255, 4))
        assert torch.equal(adv, clean), spec.name
