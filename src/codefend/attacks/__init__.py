"""Attacks: each lowers an ``Objective`` inside a bound; listed in ``ATTACKS`` and ``TEXT_ATTACKS``.

Importing this module does not import torch: attacks and objectives load when one is built.
"""

from __future__ import annotations

from typing import Any

from codefend.attacks.single import attack, check_target
from codefend.attacks.specs import NEEDS_SENTENCE, AttackSpec, Bound, Goal, TextAttackSpec, Threat
from codefend.attacks.table import ATTACKS, EVERY_ATTACK, OUTSIDE_ATTACKS, TEXT_ATTACKS

__all__ = [
    "ATTACKS",
    "EVERY_ATTACK",
    "NEEDS_SENTENCE",
    "OUTSIDE_ATTACKS",
    "TEXT_ATTACKS",
    "AttackSpec",
    "Bound",
    "Goal",
    "TextAttackSpec",
    "Threat",
    "attack",
    "check_target",
]


def __getattr__(name: str) -> Any:
    """`objective_for` and `prompt_objective_for`, whose module imports torch, on first use."""
    if name not in ("objective_for", "prompt_objective_for"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from codefend.attacks import objectives

    return getattr(objectives, name)
