"""Generators depend on the seed and on every name."""

from __future__ import annotations

from typing import Any

import torch

from codefend.core.seeds import make_generator


def test_generators_depend_on_seed_and_every_name() -> None:
    def draw(*args: Any) -> float:
        return float(torch.rand((), generator=make_generator(*args), dtype=torch.float64))

    assert draw(0, "noise", "a") == draw(0, "noise", "a")
    different = {draw(0), draw(1), draw(0, "noise"), draw(0, "noise", "a"), draw(0, "noisea"), draw(0, "a", "noise")}
    assert len(different) == 6


def test_make_generator_leaves_the_global_seed_alone() -> None:
    before = torch.get_rng_state()
    make_generator(3, "x")
    assert torch.equal(before, torch.get_rng_state())
