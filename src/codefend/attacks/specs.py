"""Rows of the table of attacks, as data. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from codefend.types import Attack

if TYPE_CHECKING:
    from codefend.attacks.base import TextAttack

Goal = Literal[
    "untargeted",  # make the true answer unlikely
    "targeted",  # make the attacker's sentence likely
    "margin",  # put another token before each of the true answer's
    "margin-targeted",  # put each of the sentence's tokens first
    "feature",  # turn the vision tokens away from the clean image's
    "feature-target",  # turn them towards another image's
    "feature-text",  # turn them towards the sentence, in a space that tokens and words share
    "feature-words",  # turn each of them away from its nearest word
    "classes",  # show other classes, or the one that the prompt asks about in vain
    "hidden-image",  # show another image once the victim has shrunk them
    "answer",  # change the text of the answer, from answers alone
    "answer-target",  # bring the text of the answer close to the sentence, from answers alone
]
# "white-box" attacks need gradients, "score" attacks the objective's value; a "control" has no adversary.
Threat = Literal["white-box", "score", "control"]
# "ball": Budget's norm and eps. Anything else is the attack's own limit, which no eps changes (`norms.OwnBound`).
Bound = Literal["ball", "flow", "colour", "patch", "none"]

NEEDS_IMAGE: tuple[Goal, ...] = ("feature-target", "hidden-image")
NEEDS_SENTENCE: tuple[Goal, ...] = ("targeted", "margin-targeted", "feature-text", "answer-target")
# No text or image is wanted in place of the true one: the attack succeeds where the score falls.
UNTARGETED: tuple[Goal, ...] = ("untargeted", "margin", "feature", "feature-words", "classes", "answer")


@dataclass(frozen=True)
class AttackSpec:
    """One row of ``codefend list attacks``: an algorithm, and the objective that it lowers.

    The algorithm is a class, or ``"module:Class"``, which only `build` imports; it is called with ``name`` and
    ``options``. The objective is named by ``goal``: ``objective_for`` makes it from a victim. So one algorithm serves
    several rows, and an algorithm knows neither victims nor goals.
    """

    name: str
    summary: str
    source: str
    threat: Threat
    algorithm: str | Callable[..., Attack]  # usually a `base.ImageAttack`
    goal: Goal = "untargeted"
    steps: int = 100  # usual ``Budget.steps``: gradient steps, or queries for a score attack
    bound: Bound = "ball"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Attack:
        """A new instance of the algorithm with this row's options."""
        attack: Attack = _load(self.algorithm)(name=self.name, **self.options)
        return attack


@dataclass(frozen=True)
class TextAttackSpec:
    """A row for an attack on the prompt, on text in the image, or on prompt and image (`base.TextAttack`)."""

    name: str
    summary: str
    source: str
    threat: Threat
    algorithm: str | Callable[..., TextAttack]  # also takes ``sentence`` where the goal is "targeted"
    goal: Goal = "untargeted"
    steps: int = 100  # usual ``Budget.steps``: evaluations, or gradient steps of an attack on both
    changes: Literal["prompt", "image", "both"] = "prompt"

    @property
    def bound(self) -> Bound:
        """Images stay in the ball where a gradient moves them; text written over them has no bound."""
        return "ball" if self.changes == "both" else "none"

    def build(self, sentence: str = "") -> TextAttack:
        """A new instance that forces ``sentence``; "" leaves the algorithm's default."""
        options = {"sentence": sentence} if sentence and self.goal in NEEDS_SENTENCE else {}
        attack: TextAttack = _load(self.algorithm)(name=self.name, **options)
        return attack


def _load(algorithm: str | Callable[..., Any]) -> Any:
    return resolve_name(algorithm) if isinstance(algorithm, str) else algorithm


@runtime_checkable
class HasRestarts(Protocol):
    """An attack of several independent runs, best per example."""

    restarts: int


def restarts_of(attack: object) -> int:
    """The number of an attack's independent runs."""
    return attack.restarts if isinstance(attack, HasRestarts) else 1
