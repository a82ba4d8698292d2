"""Attacks on the prompt by random search over small edits: typing errors, letters that look alike, rewordings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from codefend.attacks.base import BestPrompts, PromptObjective, TextAttack
from codefend.attacks.norms import uniform
from codefend.core.text_edits import Edit, lookalikes, rewordings, rewrite, typos
from codefend.types import Budget, CodefendError


@dataclass(kw_only=True)
class PromptEdits(TextAttack):
    """Random hill climbing over sets of at most ``edits`` edits of each prompt; one candidate per example and step.

    A candidate adds an edit to the best set so far or exchanges one. Images are left unchanged.
    """

    edits: int = 4  # per prompt
    separator: ClassVar[str] = ""  # between units: "" for characters, " " for words

    def __post_init__(self) -> None:
        if self.edits < 1:
            raise CodefendError(f"edits of attack {self.name!r} must be 1 or more, not {self.edits}")

    @staticmethod
    @abstractmethod
    def menu(units: Sequence[str]) -> list[Edit]:
        """Every single edit that is allowed in ``units``, characters or words."""

    def __call__(
        self,
        objective: PromptObjective,
        images: Tensor,
        prompts: Sequence[str],
        budget: Budget,
        *,
        generator: Generator | None = None,
    ) -> tuple[Tensor, list[str]]:
        best = BestPrompts(self, objective, images, prompts, budget.eot)
        units = [prompt.split(self.separator) if self.separator else list(prompt) for prompt in prompts]
        menus, best_edits = [self.menu(u) for u in units], [list[Edit]() for _ in units]
        for step in range(budget.steps):
            trials = [self._vary(*pair, images, generator) for pair in zip(best_edits, menus, strict=True)]
            candidates = [self.separator.join(rewrite(u, trial)) for u, trial in zip(units, trials, strict=True)]
            for i, improved in enumerate(best.update(candidates, step)):
                if improved:
                    best_edits[i] = trials[i]
        return images, best.prompts

    def _vary(self, edits: list[Edit], menu: list[Edit], like: Tensor, generator: Generator | None) -> list[Edit]:
        """``edits`` with one more of the menu, or with one exchanged for it."""
        if not menu:
            return edits
        add, out, new = uniform(like, generator, shape=(3,)).tolist()
        edits = list(edits)
        if len(edits) >= self.edits or (edits and add < 0.5):
            edits.pop(int(out * len(edits)))
        addition = menu[min(int(new * len(menu)), len(menu) - 1)]
        return [edit for edit in edits if edit.disjoint(addition)] + [addition]


@dataclass(kw_only=True)
class CharacterEdits(PromptEdits):
    """Up to ``edits`` typing errors per prompt (after DeepWordBug 1801.04354, TextBugger 1812.05271)."""

    name: str = "characters"

    @staticmethod
    def menu(units: Sequence[str]) -> list[Edit]:
        return typos(units)


@dataclass(kw_only=True)
class GlyphEdits(PromptEdits):
    """Up to ``edits`` letters exchanged for ones that look alike (after VIPER, Eger et al. 2019, 1903.11508)."""

    name: str = "glyphs"

    @staticmethod
    def menu(units: Sequence[str]) -> list[Edit]:
        return lookalikes(units)


@dataclass(kw_only=True)
class WordEdits(PromptEdits):
    """Up to ``edits`` small rewordings per prompt (operations of EDA, Wei & Zou 2019, 1901.11196)."""

    edits: int = 3  # per prompt
    name: str = "words"
    separator: ClassVar[str] = " "

    @staticmethod
    def menu(units: Sequence[str]) -> list[Edit]:
        return rewordings(units)
