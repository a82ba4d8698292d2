"""A row of the table of attacks. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from codefend.types import Attack

if TYPE_CHECKING:
    from codefend.attacks.text import TextAttack

Goal = Literal[
    "untargeted",
    "targeted",
    "margin",
    "margin-targeted",
    "feature",
    "feature-target",
    "feature-text",
    "feature-words",
    "answer",
    "answer-target",
]
Threat = Literal["white-box", "score", "control"]
# "ball": Budget's norm and eps. Anything else is the attack's own limit, which no eps changes (`bounds.OwnBound`).
Bound = Literal["ball", "flow", "colour", "patch", "none"]

NEEDS_SENTENCE: tuple[Goal, ...] = ("targeted", "margin-targeted", "feature-text", "answer-target")


@dataclass(frozen=True)
class AttackSpec:
    """One row of ``codefend list attacks``: what it is, where it comes from, what it must see, what it wants."""

    name: str
    summary: str
    source: str
    threat: Threat
    build: Callable[[], Attack]
    goal: Goal = "untargeted"
    steps: int = 100  # usual ``Budget.steps``: gradient steps, or queries for a score attack
    bound: Bound = "ball"


@dataclass(frozen=True)
class TextAttackSpec:
    """A row for an attack that changes what is asked, what is shown, or both (`text.TextAttack`).

    ``build`` takes the sentence to plant; "" leaves the attack's own.
    """

    name: str
    summary: str
    source: str
    threat: Threat
    build: Callable[[str], TextAttack]
    goal: Goal = "untargeted"
    steps: int = 100  # usual ``Budget.steps``: looks at the objective, or gradient steps of a joint attack
    changes: Literal["prompt", "image", "both"] = "prompt"

    @property
    def bound(self) -> Bound:
        """Pictures stay in the ball where a gradient moves them; words written over them have no bound."""
        return "ball" if self.changes == "both" else "none"
