"""Notes on attacked images: violations of the budget, loss curves, gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from codefend import attacks
from codefend.attacks import AttackSpec
from codefend.attacks.base import Trace
from codefend.bench.attacking import curves, gradients
from codefend.types import Budget, Objective
from evaluate_kit import SMALL, run


class Cheat:
    """Claims a budget and spends another."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def __call__(
        self, objective: Objective, images: Tensor, budget: Budget, *, generator: Generator | None = None
    ) -> Tensor:
        if self.kind == "far":
            return (images + 3 * budget.eps).clamp(0, 1)
        if self.kind == "outside":
            return torch.where(images > 0.79, images + 0.5, images)
        return torch.full_like(images, math.nan)


@pytest.mark.parametrize(("kind", "reason"), [("far", "away"), ("outside", "leaves"), ("nan", "not finite")])
def test_violation_is_flagged_and_the_judged_image_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    spec = AttackSpec("cheat", "", "", "white-box", Cheat, options={"kind": kind})
    monkeypatch.setitem(attacks.EVERY_ATTACK, "cheat", spec)
    rows = run(tmp_path, replace(SMALL, attacks=("cheat",), defenses=("none",), threats=("T0",)))
    attacked = [row for row in rows if row["attack"] == "cheat"]
    assert all(reason in row["violation"] for row in attacked)
    assert all(row["perturbation"]["linf"] <= 8 / 255 + 1e-6 for row in attacked)
    assert all(row["curve"] is None and row["gradient"] is None for row in attacked)  # it offers no hooks


def test_curves_tell_converged_from_falling() -> None:
    steps = torch.arange(51.0)
    falling, settled, broken = -steps, -steps.clamp_max(10), steps * math.nan
    first, second, third = curves(list(torch.stack([falling, settled, broken], 1)), 3)
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first["start"], first["end"], first["converged"]) == (0.0, -50.0, False)
    assert second["converged"]
    assert second["late"] == 0
    assert third["start"] != third["start"]
    assert curves([torch.zeros(2)], 2) == [None, None]


def test_gradient_summary() -> None:
    trace = Trace()
    for step, norm in enumerate((0.0, 2.0, 4.0, 6.0)):
        trace.gradient(step, torch.tensor([norm]), torch.tensor([step]))
    assert gradients(trace, 1) == [{"min": 0.0, "max": 6.0, "median": 2.0, "zero_share": 0.25, "nonfinite": 6}]
    assert gradients(Trace(), 2) == [None, None]
