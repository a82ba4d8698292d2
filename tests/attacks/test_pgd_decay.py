"""PGD with falling steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from codefend.attacks.pgd import PGDDecay
from codefend.types import Budget


def test_steps_fall_geometrically_from_eps_to_a_twentieth() -> None:
    attack, budget = PGDDecay(), Budget("linf", 8 / 255, 40)
    steps = [attack.step_size(step, budget) for step in range(40)]
    assert steps[0] == pytest.approx(8 / 255)
    assert steps[-1] == pytest.approx(8 / 255 / 20)
    falls = [b / a for a, b in pairwise(steps)]
    assert falls == pytest.approx([falls[0]] * 39)


def test_one_step_is_a_whole_eps() -> None:
    clean = torch.full((1, 3, 4, 4), 0.5)
    adv = PGDDecay(random_start=False)(lambda x: x.flatten(1).mean(1), clean, Budget("linf", 0.1, 1))
    assert torch.allclose(adv, clean - 0.1)
