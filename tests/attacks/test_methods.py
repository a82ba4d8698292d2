"""What is special about each attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attacks_kit import ANSWERS, BUDGETS, PROMPTS, CallCounter, Noisy, ToyVictim, both_norms, pictures, seeded, setup
from codefend.attacks import ATTACKS
from codefend.attacks.apgd import APGD, checkpoints
from codefend.attacks.cw import CW
from codefend.attacks.mifgsm import diversify
from codefend.attacks.norms import distance, length
from codefend.attacks.objectives import features_away, targeted, untargeted
from codefend.attacks.patch import AdversarialPatch
from codefend.attacks.pgd import PGD
from codefend.attacks.pgd_decay import PGDDecay
from codefend.attacks.square import SquareAttack, pyramid
from codefend.attacks.trace import Trace
from codefend.contrib.attacks.rgf import RGF, rounds
from codefend.contrib.attacks.spsa import SPSA
from codefend.contrib.attacks.universal import UniversalPerturbation
from codefend.defense import DefendedVictim, Defense
from codefend.types import Budget, Objective


def test_apgd_checkpoints_are_the_papers() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1000)[0] == 220


def rugged(seed: int, width: int = 3 * 8 * 8) -> Objective:
    """A valley with ripples: the slope leads down, its walls need smaller steps, and there are local minima."""
    generator = seeded(seed)
    centre = 0.5 + 0.08 * (torch.rand(width, generator=generator) - 0.5)
    mix = torch.randn(width, width, generator=generator) / width**0.5

    def objective(images: Tensor) -> Tensor:
        away = (images.flatten(1) - centre) @ mix * 30
        ripples: Tensor = away.square() + 1 - (3 * away).cos()
        return ripples.mean(1)

    return objective


@both_norms
def test_apgd_is_at_least_as_good_as_pgd(norm: Any) -> None:
    clean = torch.full((8, 3, 8, 8), 0.5)
    budget = Budget(norm, 8 / 255 if norm == "linf" else 0.4, 60)
    gains = []
    for seed in range(6):
        objective = rugged(seed)
        apgd = objective(APGD()(objective, clean, budget, generator=seeded(seed)))
        pgd = objective(PGD()(objective, clean, budget, generator=seeded(seed)))
        gains.append(float((pgd - apgd).mean()))
    assert sum(gains) >= 0
    assert sum(g >= 0 for g in gains) >= 5


@pytest.mark.parametrize("cls", [PGD, APGD])
def test_restarts_never_hurt(cls: type[PGD] | type[APGD]) -> None:
    objective, clean = rugged(3), torch.full((4, 3, 8, 8), 0.5)
    budget = Budget("linf", 8 / 255, 8)
    once = objective(cls()(objective, clean, budget, generator=seeded()))
    thrice = objective(cls(restarts=3)(objective, clean, budget, generator=seeded()))
    assert (thrice <= once + 1e-7).all()
    assert thrice.mean() < once.mean()


def test_more_steps_do_not_hurt_apgd() -> None:
    objective, clean = setup(ATTACKS["apgd"])
    losses = [
        float(objective(APGD()(objective, clean, Budget("linf", 4 / 255, n), generator=seeded())).mean())
        for n in (5, 20, 80)
    ]
    assert losses[0] >= losses[1] - 1e-3
    assert losses[1] >= losses[2] - 1e-3


def test_white_box_beats_score_only() -> None:
    objective, clean = setup(ATTACKS["apgd"])
    apgd = objective(APGD()(objective, clean, Budget("linf", 8 / 255, 30), generator=seeded())).mean()
    for attack in (SquareAttack(), RGF(), SPSA()):
        assert apgd <= objective(attack(objective, clean, Budget("linf", 8 / 255, 200), generator=seeded())).mean()


def test_feature_attack_needs_its_random_start() -> None:
    clean = pictures()
    objective = features_away(ToyVictim(), clean)
    trace, still = Trace(), PGD(random_start=False)
    trace.attach(still)
    still(objective, clean, BUDGETS["linf"])
    assert trace.gradient_norms[0].max() < 1e-4  # the clean image is the maximum
    assert (objective(PGD()(objective, clean, BUDGETS["linf"], generator=seeded())) < 0.99).all()


def test_cw_moves_saturated_pixels() -> None:
    clean = torch.zeros(1, 3, 4, 4)  # where a tanh change of variables has no slope
    adv = CW()(lambda x: -x.flatten(1).mean(1), clean, Budget("linf", 8 / 255, 40))
    assert adv.mean() > 6 / 255


def test_diversify_keeps_the_shape_and_the_gradient() -> None:
    clean = pictures().requires_grad_(True)
    resized = diversify(clean, 0.5, seeded())
    assert resized.shape == clean.shape
    assert not torch.equal(resized, clean)
    (grad,) = torch.autograd.grad(resized.sum(), clean)
    assert (grad != 0).float().mean() > 0.2


@pytest.mark.parametrize("side", [2, 3, 5, 8])
def test_square_pyramid_has_unit_norm_and_two_signs(side: int) -> None:
    eta = pyramid(side, torch.zeros(1))
    assert eta.shape == (side, side)
    assert float(eta.norm()) == pytest.approx(1.0)
    assert eta.min() < 0 < eta.max()


@pytest.mark.parametrize("size", [3, 5, 8])
def test_square_takes_tiny_images(size: int) -> None:
    clean = pictures(2, size)
    for budget in (Budget("linf", 8 / 255, 30), Budget("l2", 0.3, 30)):
        adv = SquareAttack()(lambda x: x.flatten(1).mean(1), clean, budget, generator=seeded())
        assert (distance(adv, clean, budget.norm) <= budget.eps + 1e-6).all()
        assert adv.mean() < clean.mean()


@pytest.mark.parametrize("attack", [SquareAttack(), RGF(), SPSA()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("queries", [50, 333])
def test_score_attacks_spend_their_queries_and_no_gradient(attack: Any, queries: int) -> None:
    counted = CallCounter(untargeted(ToyVictim(), PROMPTS, ANSWERS))

    def black_box(images: Tensor) -> Tensor:
        assert not images.requires_grad
        return counted(images).detach()

    attack(black_box, pictures(), Budget("linf", 8 / 255, queries), generator=seeded())
    assert 0.7 * queries <= counted.calls <= queries + 2


@pytest.mark.parametrize(("queries", "expected"), [(800, (8, 100)), (5000, (50, 100)), (80, (8, 10)), (1, (1, 2))])
def test_rounds_split_the_queries(queries: int, expected: tuple[int, int]) -> None:
    assert rounds(queries, 100) == expected


def test_patch_stays_in_its_square_and_wins() -> None:
    clean, victim = pictures(), ToyVictim()
    objective = untargeted(victim, PROMPTS, ANSWERS)
    attack, budget = AdversarialPatch(side=0.4), Budget(steps=20)
    adv = attack(objective, clean, budget, generator=seeded())
    mask = attack.mask(clean, generator=seeded())
    assert mask.flatten(1).sum(1).tolist() == [36, 36, 36]  # 0.4 of 16 is 6
    assert torch.equal(adv * (1 - mask), clean * (1 - mask))
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert (objective(adv) < objective(clean)).all()
    fixed = AdversarialPatch(side=0.25, place=(0.0, 1.0)).mask(clean)
    assert fixed[0, 0, :4, 12:].all()
    assert fixed.sum() == 3 * 16


@both_norms
def test_universal_delta_is_one_for_all_and_in_budget(norm: str) -> None:
    victim, budget = ToyVictim(), BUDGETS[norm]
    batches = [(targeted(victim, PROMPTS, ["target"] * 3), pictures(seed=s)) for s in range(4)]
    attack = UniversalPerturbation()
    delta = attack.fit(batches, Budget(budget.norm, budget.eps, 40), generator=seeded())
    assert delta.shape == (1, 3, 16, 16)
    assert (length(delta, budget.norm) <= budget.eps + 1e-6).all()
    held_out = pictures(seed=99)
    objective = targeted(victim, PROMPTS, ["target"] * 3)
    assert objective(attack.apply(held_out, delta)).mean() < objective(held_out).mean()
    adv = attack(objective, held_out, budget, generator=seeded())
    assert (distance(adv, held_out, budget.norm) <= budget.eps + 1e-6).all()
    assert objective(adv).mean() <= objective(held_out).mean()
    assert torch.equal(attack(objective, held_out, Budget(budget.norm, 0.0)), held_out)


@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_noise_does_not_stall_apgd(sigma: float) -> None:
    """With the lowest of many noisy losses kept as it is, APGD falls behind PGD with falling steps by .02 and .07."""
    deficits = []
    for seed in range(3):
        clean, prompts, answers = pictures(6, seed=seed + 10), PROMPTS * 2, ANSWERS * 2
        defense, budget = Defense(Noisy(sigma), name="noisy"), Budget("linf", 4 / 255, 40, eot=2)

        def loss(attack: Any) -> float:
            objectives = [
                untargeted(DefendedVictim(ToyVictim(seed), defense, generator=seeded(s)), prompts, answers)  # noqa: B023
                for s in (seed, 99)  # noqa: B023
            ]
            adv = attack(objectives[0], clean, budget, generator=seeded(seed))  # noqa: B023
            return float(torch.stack([objectives[1](adv) for _ in range(60)]).mean())

        deficits.append(loss(APGD()) - loss(PGDDecay()))
    assert sum(deficits) / len(deficits) < 0.012
