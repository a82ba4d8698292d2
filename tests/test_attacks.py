"""One contract for every attack in the table, then what is special about each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codefend.attacks import ATTACKS, AttackSpec, objective_for
from codefend.attacks.apgd import APGD, checkpoints
from codefend.attacks.bounds import OwnBound, excess, finished
from codefend.attacks.cw import CW
from codefend.attacks.mifgsm import MIFGSM, diversify
from codefend.attacks.noise import Noise
from codefend.attacks.norms import (
    descend,
    direction,
    distance,
    length,
    project,
    quantize_in_budget,
    random_start,
)
from codefend.attacks.objectives import Counted, features_away, targeted, untargeted
from codefend.attacks.patch import Patch
from codefend.attacks.pgd import PGD
from codefend.attacks.rgf import RGF, rounds
from codefend.attacks.search import Adam, Best, Trace, score
from codefend.attacks.spsa import SPSA
from codefend.attacks.square import Square, pyramid
from codefend.attacks.universal import Universal
from codefend.defense import Defense
from codefend.types import Budget, Objective, UserError, WhiteBox
from test_objectives import ANSWERS, PROMPTS, Defended, Dim, Noisy, ToyVictim, pictures

BUDGETS = {"linf": Budget("linf", 8 / 255, 12), "l2": Budget("l2", 0.5, 12)}
VICTIMS: dict[str, Callable[[], WhiteBox]] = {
    "bare": ToyVictim,
    "defended": lambda: Defended(ToyVictim(), Defense(purifier=Dim(), policy=lambda p: p + "!", name="dim")),
}
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
AUGMENTED = ("dim", "ssa-cwa", "pureproof", "stadv")  # their gradients are taken somewhere else than at the image


every_attack = pytest.mark.parametrize("spec", ATTACKS.values(), ids=lambda spec: spec.name)
# eps and norm mean nothing to an attack with a bound of its own.
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
both_norms = pytest.mark.parametrize("norm", BUDGETS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def made_for(spec: AttackSpec, victim: WhiteBox, clean: Tensor) -> Objective:
    answers, target = list(ANSWERS), ["target"] * 3
    if spec.goal.startswith("answer"):  # what the victim says before, and what it says of other pictures
        answers, target = victim.generate(clean, PROMPTS), victim.generate(pictures(seed=2), PROMPTS)
    return objective_for(spec, victim, PROMPTS, answers, target, clean, pictures(seed=2))


def setup(spec: AttackSpec, victim: str = "bare", images: Tensor | None = None) -> tuple[Objective, Tensor]:
    clean = pictures() if images is None else images
    return made_for(spec, VICTIMS[victim](), clean), clean


# The contract


@every_case
def test_contract(spec: AttackSpec, norm: str, victim: str) -> None:
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
    assert (excess(attack, finished(attack, adv, clean, budget), clean, budget) <= 1e-6).all()
    if spec.name not in SHARED:
        assert (objective(adv) <= objective(clean) + 1e-6).all()
    assert torch.equal(adv, built(spec)(objective, clean, budget, generator=seeded()))
    if spec.threat != "control":
        assert_beats_noise(spec, objective(adv), objective(Noise()(objective, clean, budget, generator=seeded())))


def assert_beats_noise(spec: AttackSpec, adv: Tensor, noise: Tensor) -> None:
    assert adv.mean() < noise.mean() - 1e-3
    if spec.name not in SHARED and spec.bound == "ball" and not spec.goal.startswith("answer"):
        assert (adv <= noise + 1e-4).all()


@every_attack
def test_zero_eps_returns_the_input(spec: AttackSpec) -> None:
    objective, clean = setup(spec)
    for norm in ("linf", "l2") if spec.bound == "ball" else ():
        assert torch.equal(built(spec)(objective, clean, Budget(norm, 0.0, 5)), clean)


@every_attack
def test_follows_double_precision(spec: AttackSpec) -> None:
    objective, clean = setup(spec, images=pictures().double())
    assert built(spec)(objective, clean, Budget("linf", 8 / 255, 3), generator=seeded()).dtype == torch.float64


@pytest.mark.parametrize(
    "attack",
    [PGD(random_start=False), APGD(random_start=False), MIFGSM(), MIFGSM(nesterov=True), CW()],
    ids=lambda attack: f"{attack.name}-{getattr(attack, 'nesterov', '')}",
)
@both_norms
def test_an_example_does_not_depend_on_its_batch(attack: Any, norm: str) -> None:
    clean, order = pictures(), [2, 0, 1]
    victim, budget = ToyVictim(), BUDGETS[norm]
    adv = attack(untargeted(victim, PROMPTS, ANSWERS), clean, budget)
    shuffled = attack(
        untargeted(victim, [PROMPTS[i] for i in order], [ANSWERS[i] for i in order]), clean[order], budget
    )
    alone = attack(untargeted(victim, PROMPTS[:1], ANSWERS[:1]), clean[:1], budget)
    assert torch.allclose(shuffled, adv[order], atol=1e-5)
    assert torch.allclose(alone, adv[:1], atol=1e-5)


@every_attack
def test_works_behind_a_randomized_defense(spec: AttackSpec) -> None:
    victim = Defended(ToyVictim(), Defense(purifier=Noisy(0.05), name="noisy"), generator=seeded())
    clean = pictures()
    objective = made_for(spec, victim, clean)
    base = budget_of(spec, "linf")
    adv = built(spec)(objective, clean, Budget("linf", base.eps, base.steps, eot=3), generator=seeded())

    def mean(images: Tensor) -> Tensor:
        return torch.stack([objective(images).detach() for _ in range(64)]).mean(0)

    gain = (mean(clean) - mean(adv)).mean()
    assert gain > (0.0 if spec.threat == "control" else 0.01)


# Hooks, gradients and the choice of the best


@every_attack
def test_trace_hears_every_step(spec: AttackSpec) -> None:
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


def test_trace_refuses_what_it_cannot_hear() -> None:
    assert not Trace().attach(object())


@pytest.mark.parametrize("spec", [s for s in ATTACKS.values() if s.threat == "white-box"], ids=lambda s: s.name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nonfinite_gradients_are_counted_and_survived(spec: AttackSpec, poison: float) -> None:
    clean = pictures()
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
    clean = pictures()
    for spec in ATTACKS.values():
        adv = built(spec)(lambda x: x.flatten(1).sum(1) * math.nan, clean, Budget("linf", 8 / 255, 4))
        assert torch.equal(adv, clean), spec.name


def test_no_gradient_is_said_in_one_line() -> None:
    for objective in (lambda x: x.detach().flatten(1).sum(1), lambda x: torch.ones(3, requires_grad=True) * 2):
        with pytest.raises(UserError, match="StraightThrough"):
            PGD()(objective, pictures(), BUDGETS["linf"])


def test_reduced_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="one number per image"):
        PGD()(lambda x: x.sum(), pictures(), BUDGETS["linf"])


def test_returns_the_best_seen_not_the_last() -> None:
    clean = torch.full((2, 3, 4, 4), 0.5)
    seen: list[Tensor] = []

    def misleading(images: Tensor) -> Tensor:  # lowest at 0.45, but its gradient leads on to 0.4
        mean = images.flatten(1).mean(1)
        losses = (mean - 0.45).abs().detach() + mean - mean.detach()
        seen.append(losses.detach())
        return losses

    adv = PGD(random_start=False, rel_step=1.0)(misleading, clean, Budget("linf", 0.1, 10))
    assert torch.allclose(adv, torch.full_like(adv, 0.45))
    assert (seen[-1] > 0.049).all()


def test_eot_is_not_fooled_by_a_lucky_sample() -> None:
    # Every draw adds heavy noise; only moving the mean truly helps. One sample picks luck, many pick progress.
    noise = seeded(5)
    clean = torch.full((16, 3, 4, 4), 0.5)

    def noisy(images: Tensor) -> Tensor:
        return images.flatten(1).mean(1) + 0.1 * torch.randn(len(images), generator=noise)

    def truth(eot: int) -> float:
        adv = PGD(rel_step=1.0, random_start=False)(noisy, clean, Budget("linf", 0.1, 20, eot=eot), generator=seeded(1))
        return float(adv.mean())

    assert truth(1) > 0.42  # the path runs evenly from 0.5 down to 0.4
    assert truth(16) < 0.415


def test_eot_takes_that_many_samples_per_step() -> None:
    counted = Counted(untargeted(ToyVictim(), PROMPTS, ANSWERS))
    PGD()(counted, pictures(), Budget("linf", 8 / 255, 10, eot=4), generator=seeded())
    assert counted.calls == 4 * (1 + 10 + 1 + 2)  # clean, steps, last iterate, two finalists


def test_adam_follows_the_papers_formulas() -> None:
    adam, g1, g2 = Adam(), torch.tensor([2.0, -1e-9]), torch.tensor([-1.0, 3e-9])
    assert torch.allclose(adam(g1), torch.tensor([1.0, -1.0]), atol=1e-2)  # the bias correction makes it a sign
    mean = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    square = (0.999 * 0.001 * g1**2 + 0.001 * g2**2) / (1 - 0.999**2)
    assert torch.allclose(adam(g2), mean / square.sqrt(), atol=1e-2)


def test_best_prefers_finite_and_lower() -> None:
    best = Best(torch.zeros(3, 1, 1, 1), torch.tensor([1.0, math.nan, 1.0]))
    improved = best.update(torch.ones(3, 1, 1, 1), torch.tensor([0.5, 2.0, math.nan]))
    assert improved.tolist() == [True, True, False]
    assert best.images.flatten().tolist() == [1, 1, 0]


def test_gradient_memory_holds_one_sample() -> None:
    alive: list[int] = []
    live = 0

    class Tracked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor) -> Tensor:
            nonlocal live
            live += 1
            alive.append(live)
            return images * 1.0

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal live
            live -= 1
            return grad

    objective = targeted(ToyVictim(), PROMPTS, ANSWERS)
    graded = Counted(lambda x: objective(Tracked.apply(x)) if x.requires_grad else objective(x))  # type: ignore[no-untyped-call]
    for attack in (PGD(), APGD(), MIFGSM(), CW()):
        attack(graded, pictures(), Budget("linf", 8 / 255, 5, eot=3), generator=seeded())
    assert max(alive) == 1
    assert live == 0


# Norms and 8 bits


@both_norms
def test_projection_and_start_stay_in_the_ball(norm: str) -> None:
    clean, budget = pictures(), BUDGETS[norm]
    for images in (torch.randn(clean.shape, generator=seeded()), random_start(clean, budget, generator=seeded())):
        inside = project(images, clean, budget)
        assert (distance(inside, clean, budget.norm) <= budget.eps + 1e-6).all()
        assert inside.min() >= 0
        assert inside.max() <= 1
        assert torch.allclose(project(inside, clean, budget), inside, atol=1e-6)


def test_directions_have_unit_norm_at_any_scale() -> None:
    grad = torch.randn(2, 3, 8, 8, generator=seeded())
    for scale in (1.0, 1e-30, 1e30):
        assert torch.allclose(length(direction(grad * scale, "l2"), "l2"), torch.ones(2), atol=1e-5)
        assert torch.equal(direction(grad * scale, "linf"), grad.sign())
    assert torch.equal(direction(torch.zeros_like(grad), "l2"), torch.zeros_like(grad))


def test_descend_takes_a_step_per_example() -> None:
    clean = torch.full((2, 3, 4, 4), 0.5)
    moved = descend(clean, torch.ones_like(clean), torch.tensor([0.01, 0.02]), clean, Budget("linf", 0.1))
    assert torch.allclose(moved.amax((1, 2, 3)), torch.tensor([0.49, 0.48]))


@settings(max_examples=60, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.one_of(st.sampled_from([0.0, 1 / 255, 2 / 255, 8 / 255]), st.floats(0, 1.5)),
    seed=st.integers(0, 2**20),
    reach=st.floats(0, 3),
)
def test_quantized_images_are_8_bit_and_in_budget(norm: Any, eps: float, seed: int, reach: float) -> None:
    clean, budget = pictures(2, 8, seed), Budget(norm, eps)
    adv = project(clean + reach * eps * torch.randn(clean.shape, generator=seeded(seed)), clean, budget)
    rounded = quantize_in_budget(adv, clean, budget)
    levels = rounded * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert rounded.min() >= 0
    assert rounded.max() <= 1
    assert (distance(rounded, clean, norm) <= eps + 1e-6).all()
    assert torch.allclose(quantize_in_budget(rounded, clean, budget), rounded, atol=1e-6)
    if norm == "linf":
        assert ((rounded - adv).abs().amax() <= 0.5 / 255 + 1e-6) or eps * 255 % 1 > 0
    elif (distance((adv * 255).round() / 255, clean, norm) <= eps).all():
        assert torch.allclose(rounded, (adv * 255).round() / 255)


def test_quantizing_keeps_most_of_an_l2_perturbation() -> None:
    clean, budget = pictures(4, 16), Budget("l2", 0.5)
    adv = random_start(clean, budget, generator=seeded())
    kept = distance(quantize_in_budget(adv, clean, budget), clean, "l2") / distance(adv, clean, "l2")
    assert kept.min() > 0.97


def test_quantizing_off_the_8_bit_grid_falls_back_to_the_rounded_clean() -> None:
    clean = torch.full((1, 3, 4, 4), 100.5 / 255)
    for budget in (Budget("linf", 0.1 / 255), Budget("l2", 1e-4)):
        levels = quantize_in_budget(clean, clean, budget) * 255
        assert torch.allclose(levels, torch.full_like(levels, 100.0))


# What is special about each


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
    for attack in (Square(), RGF(), SPSA()):
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
        adv = Square()(lambda x: x.flatten(1).mean(1), clean, budget, generator=seeded())
        assert (distance(adv, clean, budget.norm) <= budget.eps + 1e-6).all()
        assert adv.mean() < clean.mean()


@pytest.mark.parametrize("attack", [Square(), RGF(), SPSA()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("queries", [50, 333])
def test_score_attacks_spend_their_queries_and_no_gradient(attack: Any, queries: int) -> None:
    counted = Counted(untargeted(ToyVictim(), PROMPTS, ANSWERS))

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
    attack, budget = Patch(side=0.4), Budget(steps=20)
    adv = attack(objective, clean, budget, generator=seeded())
    mask = attack.mask(clean, generator=seeded())
    assert mask.flatten(1).sum(1).tolist() == [36, 36, 36]  # 0.4 of 16 is 6
    assert torch.equal(adv * (1 - mask), clean * (1 - mask))
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert (objective(adv) < objective(clean)).all()
    fixed = Patch(side=0.25, place=(0.0, 1.0)).mask(clean)
    assert fixed[0, 0, :4, 12:].all()
    assert fixed.sum() == 3 * 16


@both_norms
def test_universal_delta_is_one_for_all_and_in_budget(norm: str) -> None:
    victim, budget = ToyVictim(), BUDGETS[norm]
    batches = [(targeted(victim, PROMPTS, ["target"] * 3), pictures(seed=s)) for s in range(4)]
    attack = Universal()
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


def test_score_averages_and_reports() -> None:
    attack, heard = PGD(), []
    attack.on_step = lambda step, losses: heard.append((step, losses))
    values = iter([torch.tensor([0.0]), torch.tensor([1.0])])
    losses = score(attack, lambda x: next(values), torch.zeros(1, 3, 2, 2), 2, step=7)
    assert losses.tolist() == [0.5]
    assert heard[0][0] == 7
