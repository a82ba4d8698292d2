"""Every check fires on a defense built to fool it, and stays silent on an honest evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import toys
from codefend.bench import EvalConfig, evaluate, sanity
from codefend.bench.results import Group
from codefend.bench.sanity import CHECKS, Flag, check
from codefend.core.runs import Row
from purifiers_kit import PlainPurifier

FOOLING = EvalConfig(
    victim="toy",
    tasks=("questions",),
    defenses=("none", "leaky", "quantize", "shatter", "jitter"),
    attacks=("apgd", "noise"),
    steps=25,
    batch=12,
    panels=0,
)


def names(rows: list[Row], **where: str) -> set[str]:
    return {flag.check for flag in check(rows) if all(getattr(flag, key) == value for key, value in where.items())}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return evaluate(FOOLING, tmp_path_factory.mktemp("fooling"), loaders=toys.loaders())


# Defenses that fool an attack


def test_a_quantizing_defense_has_no_gradient(rows: list[Row]) -> None:
    assert {"zero gradient", "noise as strong"} <= names(rows, defense="quantize", threat="T2")


def test_shattering_defense_is_weaker_where_it_is_attacked_directly(rows: list[Row]) -> None:
    assert {"adaptive weaker", "noise as strong"} <= names(rows, defense="shatter", threat="T2")


def test_a_randomized_defense_needs_averaging_and_resubmission(rows: list[Row]) -> None:
    assert "random without EOT" in names(rows, defense="jitter", threat="T2", attack="apgd")
    assert "random without EOT" not in names(rows, defense="jitter", attack="noise")  # it follows no gradient
    assert "single submission" in names(rows, defense="jitter")


def test_averaging_and_resubmission_raise_no_flag(tmp_path: Path) -> None:
    config = EvalConfig(
        tasks=("questions",), defenses=("jitter",), attacks=("apgd",), threats=("T2",), steps=4, eot=2, resubmissions=2
    )
    assert not {"random without EOT", "single submission"} & names(evaluate(config, tmp_path, loaders=toys.loaders()))


@pytest.mark.parametrize(("eot", "flagged"), [(1, True), (256, False)])
def test_an_attack_that_overfits_to_single_draws_is_flagged(tmp_path: Path, eot: int, flagged: bool) -> None:
    fog = replace(toys.loaders(), purifier=lambda name, **o: toys.Jitter(0.3))
    config = replace(FOOLING, defenses=("fog",), attacks=("apgd",), threats=("T2",), eps=(4.0,), steps=10, eot=eot)
    assert ("overfitted to noise" in names(evaluate(config, tmp_path, loaders=fog))) == flagged


def test_honest_defenses_raise_nothing(rows: list[Row]) -> None:
    assert not names(rows, defense="none", attack="apgd")
    assert not names(rows, defense="leaky", attack="apgd")


def test_square_beats_a_masked_gradient(tmp_path: Path) -> None:
    config = EvalConfig(
        tasks=("questions",),
        defenses=("shatter",),
        attacks=("apgd:steps=10", "square:steps=400"),
        eps=(110.0,),  # enough to change the colours themselves
        threats=("T2",),
    )
    rows = evaluate(config, tmp_path, loaders=toys.loaders(toys.ToyVictim(checker=0.0)))
    assert "black box beats white box" in names(rows, defense="shatter", attack="square:steps=400")


class Gate(PlainPurifier):
    """Lets faint patterns through and takes loud ones off: the larger budget meets the defense, the smaller doesn't."""

    differentiable = False

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        loud = (images * toys.checkerboard(images)).mean((-2, -1)).abs().amax(1) > 3 / 255
        return torch.where(loud[:, None, None, None], toys.Smooth()(images), images)


class Cliff(PlainPurifier):
    """Lets everything through; its gradient overflows, in directions that mean nothing."""

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        signs = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(0)).sub(0.5).sign()
        steep = 1e30 * images * signs
        return images.detach() + (steep - steep.detach())


class Slow(PlainPurifier):
    """Takes nearly all of the pattern off each half: every step gains a little, and the few there are don't suffice."""

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        halves = images.chunk(2, dim=-1)
        pattern = [(half * toys.checkerboard(half)).mean((-2, -1), keepdim=True) for half in halves]
        rest = [half - 0.98 * p * toys.checkerboard(half) for half, p in zip(halves, pattern, strict=True)]
        return torch.cat(rest, -1)


class Snap(PlainPurifier):
    """Paints each half in the nearest clean colour; its gradient is that of a ripple and leads nowhere."""

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        colours = torch.tensor(list(toys.COLOURS.values())).to(images)
        halves = []
        for half in images.detach().chunk(2, dim=-1):
            nearest = torch.cdist(half.mean((-2, -1)), colours).argmin(1)
            halves.append(colours[nearest][..., None, None].expand_as(half))
        ripple = 1e-4 * torch.sin(1e6 * images)
        return torch.cat(halves, -1) + (ripple - ripple.detach())


FOOLERS: dict[str, Any] = {"gate": Gate, "cliff": Cliff, "slow": Slow, "snap": Snap}


def fool(folder: Path, victim: Any = None, **changes: Any) -> list[Row]:
    config = replace(FOOLING, attacks=("apgd",), steps=10) if "attacks" not in changes else FOOLING
    loaders = replace(toys.loaders(victim), purifier=lambda name, **o: FOOLERS.get(name, toys.PURIFIERS.get(name))(**o))
    return evaluate(replace(config, **changes), folder, loaders=loaders)


def test_a_gate_that_stops_only_strong_attacks_is_flagged_by_eps(tmp_path: Path) -> None:
    rows = fool(tmp_path, defenses=("none", "gate"), eps=(4.0, 8.0), threats=("T0",))
    assert "larger budget helps the defender" in names(rows, defense="gate", threat="T0")
    assert "larger budget helps the defender" not in names(rows, defense="none")


def test_a_gate_that_stops_only_strong_attacks_is_flagged_by_steps(tmp_path: Path) -> None:
    rows = fool(tmp_path, defenses=("none", "gate"), attacks=("mifgsm:steps=1,rel_step=0.5", "mifgsm:steps=8"))
    assert "larger budget helps the defender" in names(rows, defense="gate", threat="T0")


def test_a_cliff_has_exploding_gradients(tmp_path: Path) -> None:
    assert "exploding gradient" in names(fool(tmp_path, defenses=("cliff",)), defense="cliff", threat="T2")


def test_unbounded_attack_stopped_by_a_shattered_gradient(tmp_path: Path) -> None:
    rows = fool(
        tmp_path, toys.ToyVictim(checker=0.0), defenses=("none", "snap"), attacks=("mifgsm:steps=1",), eps=(255.0,)
    )
    assert "robust without bound" in names(rows, defense="snap", threat="T2")
    assert "robust without bound" not in names(rows, defense="none")


def test_shattering_defense_is_weaker_where_a_surrogate_was_attacked(tmp_path: Path) -> None:
    rows = fool(tmp_path, defenses=("shatter",), threats=("T1", "T2"), surrogate="jitter")
    reasons = [f.reason for f in check(rows) if f.check == "adaptive weaker" and f.defense == "shatter"]
    assert any("under T1" in reason or "T1 lowers" in reason for reason in reasons)


def test_an_attack_with_too_few_steps_is_flagged(tmp_path: Path) -> None:
    rows = fool(tmp_path, defenses=("slow",), threats=("T2",), attacks=("mifgsm:steps=6",))
    assert "not converged" in names(rows, defense="slow", threat="T2")


# The same checks on rows made by hand


def row(example: int, score: float, **changes: Any) -> Row:
    made: Row = {
        "task": "t",
        "defense": "d",
        "threat": "T2",
        "attack": "apgd",
        "eps": 8 / 255,
        "norm": "linf",
        "example": str(example),
        "image": str(example),
        "headline": "m",
        "mean_scores": {"m": score},
        "worst_scores": {"m": score},
        "resubmissions": 1,
        "randomized": False,
        "goal": "untargeted",
        "access": "white-box",
        "success": {"untargeted": int(score < 0.5)},
        "violation": "",
        "skipped": False,
        "objective": {"bare": -1.0, "defended": -1.0},
        "gradient": {"min": 0.1, "median": 0.2, "max": 0.3, "zero_share": 0.0, "nonfinite": 0},
        "curve": {"start": 0.0, "end": -1.0, "late": 0.0, "converged": True, "steps": 10},
        "budget": {"steps": 10, "eot": 1, "restarts": 1},
    }
    return made | changes


def several(scores: list[float], **changes: Any) -> list[Row]:
    return [row(i, score, **changes) for i, score in enumerate(scores)]


def clean(n: int = 10, **changes: Any) -> list[Row]:
    return several([1.0] * n, threat="clean", attack="none", eps=0.0, goal="none", **changes)


MIXED = [1.0, 0.0] * 5
ALL, NOTHING = [1.0] * 10, [0.0] * 10


def fired(rows: list[Row]) -> set[str]:
    return names(clean() + rows) - {"too few examples"}


def test_an_ordinary_figure_raises_no_flag() -> None:
    assert fired(several(MIXED)) == set()


def test_a_violated_budget_is_flagged() -> None:
    flags = check(several(MIXED, violation="far away") + several(MIXED, threat="T0", violation="far too"))
    assert [(f.check, f.threat) for f in flags if f.check == "budget violated"] == [
        ("budget violated", "T2"),
        ("budget violated", "T0"),
    ]
    assert "10 of 10: far away" in flags[0].reason


def test_oblivious_images_are_flagged_once_and_not_per_defense() -> None:
    both = several(MIXED, threat="T0", violation="far") + several(MIXED, threat="T0", violation="far", defense="e")
    assert sum(flag.check == "budget violated" for flag in check(both)) == 1


@pytest.mark.parametrize(
    ("gradient", "name"),
    [
        ({"zero_share": 0.5}, "zero gradient"),
        ({"median": 1e-12, "max": 1e-12}, "zero gradient"),
        ({"max": 1e9}, "exploding gradient"),
        ({"median": 1e12, "max": 2e12}, "exploding gradient"),
        ({"nonfinite": 3}, "exploding gradient"),
        ({"max": None}, "exploding gradient"),
    ],
)
def test_abnormal_gradients_are_flagged(gradient: dict[str, Any], name: str) -> None:
    sick = row(0, 1)["gradient"] | gradient
    assert fired(several(ALL, gradient=sick)) == {name}
    assert fired(several(NOTHING, gradient=sick)) == set()  # a loss may be flat where the goal is reached


@pytest.mark.parametrize("weaker", ["T0", "T1"])
def test_an_adaptive_attack_weaker_than_an_oblivious_one_is_flagged(weaker: str) -> None:
    assert fired(several(ALL) + several(MIXED, threat=weaker)) == {"adaptive weaker"}
    assert fired(several(MIXED) + several(ALL, threat=weaker)) == set()
    one_apart = [1.0, *MIXED[1:9], 1.0]  # 6 of 10 against 5 of 10: within the noise
    assert fired(several(one_apart) + several(MIXED, threat=weaker)) == set()


def test_adaptive_weaker_by_its_own_objective() -> None:
    oblivious = [row(i, s, threat="T0", objective={"defended": -3.0 - i / 10}) for i, s in enumerate(MIXED)]
    flags = check(clean() + several(MIXED) + oblivious)
    assert [flag.reason for flag in flags if flag.check == "adaptive weaker"] == [
        "on 100% of the images T0 lowers the attack's own objective further"
    ]


def test_larger_eps_helping_the_defender() -> None:
    small = several(MIXED, eps=4 / 255)
    assert fired(small + several(ALL)) == {"larger budget helps the defender"}
    assert fired(several(ALL, eps=4 / 255) + several(MIXED)) == set()


def test_more_steps_helping_the_defender() -> None:
    few = several(MIXED, attack="apgd:steps=5", budget={"steps": 5, "eot": 1, "restarts": 1})
    assert fired(few + several(ALL)) == {"larger budget helps the defender"}
    other = several(MIXED, attack="pgd", budget={"steps": 5, "eot": 1, "restarts": 1})
    assert fired(other + several(ALL)) == set()  # another attack may simply be better


def test_black_box_beating_white_box() -> None:
    square = {"attack": "square", "access": "score", "gradient": None}
    assert fired(several(ALL) + several(NOTHING, **square)) == {"black box beats white box"}
    assert fired(several(NOTHING) + several(ALL, **square)) == set()
    best = several(NOTHING, attack="pgd")  # it has to beat the strongest
    assert fired(several(ALL) + best + several(NOTHING, **square)) == set()


def test_noise_as_strong_as_the_attack() -> None:
    noise = {"attack": "noise", "access": "control", "gradient": None}
    assert fired(several(ALL) + several(ALL, **noise)) == {"noise as strong"}
    assert fired(several(MIXED) + several(ALL, **noise)) == set()
    oblivious = {"threat": "T0"}  # there a purifier that takes off both is doing its work
    assert fired(several(ALL, **oblivious) + several(ALL, **oblivious, **noise)) == set()


def test_unbounded_attack_that_does_not_reach_zero() -> None:
    assert fired(several(MIXED, eps=1.0)) == {"robust without bound"}
    assert fired(several(NOTHING, eps=1.0)) == set()


def test_loss_still_falling() -> None:
    falling = {"start": 0.0, "end": -1.0, "late": 0.3, "converged": False, "steps": 10}
    assert fired(several(ALL, curve=falling)) == {"not converged"}
    assert fired(several(NOTHING, curve=falling)) == set()  # nothing is left to break
    noise = {"attack": "noise", "access": "control", "curve": falling}
    assert fired(several(MIXED, **noise)) == set()  # draws don't converge


def test_too_few_examples() -> None:
    flags = [flag for flag in check(clean(30) + several([1.0, 0.0] * 4)) if flag.check == "too few examples"]
    assert [(flag.threat, flag.reason[:11]) for flag in flags] == [("", "30 examples"), ("T2", "8 examples:")]
    assert not check(clean(100))


def test_an_attack_on_classes_is_compared_by_score() -> None:
    classes = {"goal": "classes", "attack": "class-head"}
    assert "adaptive weaker" in fired(several(ALL, **classes) + several(MIXED, **classes, threat="T0"))


def test_targeted_attacks_are_not_compared_by_score() -> None:
    targeted = {"goal": "targeted", "attack": "apgd-targeted", "success": {"targeted": 0}}
    assert fired(several(ALL, **targeted) + several(MIXED, **targeted, threat="T0")) == set()


def test_flag_says_where_and_covers_its_figure() -> None:
    flag = Flag("zero gradient", "why", "vqa", "bridge", "T2", "apgd", 8 / 255)
    assert flag.where == "vqa · bridge · T2 · apgd · 8/255"
    assert flag.covers(Group("vqa", "bridge", "T2", "apgd", 8 / 255))
    assert not flag.covers(Group("vqa", "jpeg", "T2", "apgd", 8 / 255))
    assert Flag("too few examples", "why", "vqa").covers(Group("vqa", "jpeg", "T0", "apgd", 8 / 255))
    own = Flag("zero gradient", "why", "vqa", "bridge", "T2", "patch", 0.0)  # a bound of its own, not any
    assert own.covers(Group("vqa", "bridge", "T2", "patch", 0.0))
    assert not own.covers(Group("vqa", "bridge", "T2", "patch", 8 / 255))


def test_attacks_with_bounds_of_their_own_are_not_compared() -> None:
    words = {"attack": "characters", "access": "score", "goal": "answer", "eps": 0.0}
    patch = {"attack": "patch", "eps": 0.0}
    assert fired(several(ALL, **patch) + several(NOTHING, **words)) == set()
    corrupted = {"attack": "corruption", "access": "control", "eps": 0.0}
    assert fired(several(MIXED, **patch) + several(MIXED, **corrupted)) == set()


def test_unscored_rows_are_not_zeros() -> None:
    unscored = [row(i, 0.0, mean_scores={"m": None}, threat="T0") for i in range(10)]
    assert fired(several(ALL) + unscored) == set()


def test_every_check_is_documented_and_no_rows_raise_nothing() -> None:
    assert all(run.__doc__ for run in CHECKS.values())
    assert check([]) == []
    assert sanity.MEANINGFUL < 0.05
