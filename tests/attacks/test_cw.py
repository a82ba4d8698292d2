"""Carlini & Wagner's attack."""

from __future__ import annotations

import torch

from codefend.attacks.cw import CW
from codefend.types import Budget


def test_cw_moves_saturated_pixels() -> None:
    clean = torch.zeros(1, 3, 4, 4)  # where a tanh change of variables has no slope
    adv = CW()(lambda x: -x.flatten(1).mean(1), clean, Budget("linf", 8 / 255, 40))
    assert adv.mean() > 6 / 255
