"""Adaptive options and attacks on words through the whole evaluation, on toys with known faults."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import toys
from codefend.bench import EvalConfig, evaluate, judge
from codefend.bench.results import CLEAN
from codefend.core.runs import Row
from codefend.defense import StraightThrough
from codefend.purifiers.base import Purifier
from codefend.types import CodefendError
from evaluate_kit import untimed
from purifiers_kit import PlainPurifier

SMALL = EvalConfig(
    victim="toy", tasks=("questions",), defenses=("none", "leaky"), attacks=("apgd",), steps=12, batch=6, panels=0
)


class Repeated(toys.Leaky):
    """`Leaky` behind some passes that shatter the gradient and do nothing else: all but the first."""

    def __init__(self, evaluations: int = 3) -> None:
        super().__init__()
        self.evaluations = evaluations

    def replace(self, **options: Any) -> Repeated:
        return Repeated(**options)

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        for _ in range(self.evaluations - 1):
            images = images + 1e-4 * torch.sin(1e6 * images)
        return super().forward(images)


class Watchful(PlainPurifier):
    """Removes half of a checkerboard from each half of the image, which is detectable; leaves stripes."""

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        halves = []
        for half in images.chunk(2, dim=-1):
            board = toys.checkerboard(half)
            halves.append(half - 0.5 * (half * board).mean((-2, -1), keepdim=True) * board)
        return torch.cat(halves, -1)


def purifier(name: str, **options: Any) -> Purifier:
    own: dict[str, Any] = {"repeated": Repeated, "watchful": Watchful}
    if name in own:
        made: Purifier = own[name](**options)
        return made
    return toys.purifier(name, **options)


def run(folder: Path, config: EvalConfig) -> list[Row]:
    loaders = replace(toys.loaders(), purifier=purifier)
    return [row for row in evaluate(config, folder, loaders=loaders) if row["attack"] != CLEAN]


def mean(rows: list[Row], **where: object) -> float:
    chosen = [row["scores"][row["headline"]] for row in rows if all(row[k] == v for k, v in where.items())]
    assert chosen
    return float(sum(chosen) / len(chosen))


def test_bpda_breaks_a_shattered_gradient(tmp_path: Path) -> None:
    config = replace(
        SMALL, defenses=("none", "shatter", "rounded"), attacks=("apgd", "apgd:bpda=true"), threats=("T2",)
    )
    rows = run(tmp_path, config)
    assert mean(rows, defense="shatter", attack="apgd:bpda=true") == 0 < mean(rows, defense="shatter", attack="apgd")
    # Nothing is attacked twice: T0 sees no defense, and a defense without gradient is attacked so anyway.
    cells = {(row["defense"], row["threat"]) for row in rows if row["attack"] == "apgd:bpda=true"}
    assert cells == {("shatter", "T2")}


def test_a_shorter_process_breaks_a_masked_gradient(tmp_path: Path) -> None:
    attacks = ("apgd", "apgd:process=1")
    rows = run(tmp_path, replace(SMALL, defenses=("none", "repeated", "smooth"), attacks=attacks, threats=("T2",)))
    short = "apgd:process=1"
    assert mean(rows, defense="repeated", attack=short) == 0 < mean(rows, defense="repeated", attack="apgd")
    assert {row["defense"] for row in rows if row["attack"] == short} == {"repeated"}


def test_evading_attack_breaks_as_much_and_raises_less_suspicion(tmp_path: Path) -> None:
    victim, attacks = toys.ToyVictim(striped=200.0), ("apgd", "apgd:evade=2")
    loaders = replace(toys.loaders(victim), purifier=purifier)
    config = replace(SMALL, defenses=("watchful",), attacks=attacks, threats=("T2",), steps=30)
    rows = [row for row in evaluate(config, tmp_path, loaders=loaders) if row["attack"] != CLEAN]
    plain, evading = ([r["suspicion"] for r in rows if r["attack"] == name] for name in attacks)
    assert sum(evading) < 0.5 * sum(plain)
    assert mean(rows, attack="apgd") == 0
    assert mean(rows, attack="apgd:evade=2") < 0.2


def test_margins_go_through_a_defense(tmp_path: Path) -> None:
    rows = run(tmp_path, replace(SMALL, attacks=("apgd-margin",)))
    assert mean(rows, defense="leaky", threat="T0") == 1
    assert mean(rows, defense="leaky", threat="T2") == 0


def test_attacks_on_words_record_their_prompts(tmp_path: Path) -> None:
    config = replace(SMALL, attacks=("characters", "typographic", "joint"), threats=("T0",))
    rows = run(tmp_path, config)
    by_attack = {attack: [row for row in rows if row["attack"] == attack] for attack in config.attacks}
    assert any(row["prompt"] not in ("left?", "right?") for row in by_attack["characters"])
    assert all(row["prompt"] == row["asked"] for row in rows)
    assert all(row["perturbation"]["linf"] == 0 for row in by_attack["characters"])
    assert all(row["perturbation"]["linf"] > 0.05 for row in by_attack["typographic"] if row["objective"]["bare"] < -1)
    assert all(row["perturbation"]["linf"] <= 8 / 255 + 1e-6 for row in by_attack["joint"])
    assert not any(row["violation"] for row in rows)
    assert {row["eps"] for row in by_attack["characters"]} == {0.0}
    assert run(tmp_path, config) == rows


def test_a_planted_instruction_reaches_a_victim_that_only_answers(tmp_path: Path) -> None:
    class Obedient(toys.BlackBox):
        def generate(self, images: Tensor, prompts: Any) -> list[str]:
            return ["blue" if "blue" in prompt else "red" for prompt in prompts]

    config = replace(SMALL, attacks=("planted",), defenses=("none",), threats=("T0",))
    loaders = toys.loaders(Obedient())
    rows = [row for row in evaluate(config, tmp_path, loaders=loaders) if row["attack"] != CLEAN]
    assert all(row["success"]["targeted"] == 1 for row in rows)


def test_malformed_adaptive_options_are_named(tmp_path: Path) -> None:
    for attack in ("apgd:process=many", "apgd:bpda=perhaps", "apgd:evade=much", "joint:evade=10"):
        with pytest.raises(CodefendError, match=r"process|bpda|much|evade is for"):
            run(tmp_path, replace(SMALL, attacks=(attack,)))
    assert not list(tmp_path.iterdir())


def test_detector_of_the_weights_sets_the_limit() -> None:
    from codefend.bench.craft import detection_score, evasive_objective

    class Judged(PlainPurifier):
        class detector:
            limit = 0.0

            @staticmethod
            def logit(images: Tensor, purified: Tensor) -> Tensor:
                return (images - purified).flatten(1).mean(1)

        def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
            return torch.zeros_like(images)

    images = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 3, 4, 4) - 0.5
    judged = Judged()
    assert detection_score(judged, images, judged(images)).tolist() == [-0.25, 0.25]
    fined = evasive_objective(lambda x: torch.zeros(len(x)), judged, images, 8.0, None)
    assert fined(images).tolist() == [0.0, 2.0]  # logit(0.5) = 0


def test_evasion_has_a_gradient_where_the_purifier_has_none() -> None:
    from codefend.bench.craft import evasive_objective

    images = torch.full((2, 3, 4, 4), 0.498).requires_grad_()
    wrapped = StraightThrough(StraightThrough(toys.Rounded()))
    fined = evasive_objective(lambda x: torch.zeros(len(x)), wrapped, torch.zeros(2, 3, 4, 4), 1.0, None)
    fined(images).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().min()) > 0  # towards what rounding leaves as it is


def test_behind_a_gate_the_detection_score_is_that_of_the_gate() -> None:
    class Gated(PlainPurifier):
        """Its noise says whether it is drawn as the judge's first submission drew it."""

        gate = True

        class detector:
            @staticmethod
            def logit(images: Tensor, purified: Tensor) -> Tensor:
                return (images - purified).flatten(1).mean(1)

        def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
            return torch.randn(images.shape, generator=generator)

        def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
            return images

    images = torch.zeros(2, 3, 4, 4)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))
    scores = judge.first_detection(Gated(), images, images, 7)
    assert torch.allclose(scores, -noise.flatten(1).mean(1))


def test_rows_of_a_loss_that_is_not_finite_can_be_judged_again(tmp_path: Path) -> None:
    class Lost(toys.ToyVictim):
        def loss(self, images: Tensor, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
            return super().loss(images, prompts, targets) * torch.nan

    config = replace(SMALL, defenses=("none",), threats=("T0",))
    whole = evaluate(config, tmp_path, loaders=toys.loaders(Lost()))
    clean = [row for row in whole if row["attack"] == CLEAN]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clean))
    assert untimed(evaluate(config, tmp_path, loaders=toys.loaders(Lost()))) == untimed(whole)
