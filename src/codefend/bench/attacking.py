"""One batch under one attack: the attack's goal and the finished 8-bit images. The grid and prompt search share it.

goal = AttackGoal(EVERY_ATTACK["apgd"], examples, clean_images(examples), target=task.target)
result = attack_batch(goal.spec.build(), goal, victim, Budget(steps=20), generator=generator)
result.images, result.prompts  # what the victim is asked about, and how
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.attacks import AttackSpec, TextAttackSpec, objective_for, prompt_objective_for
from codefend.attacks.base import PromptObjective
from codefend.attacks.bounds import quantize_attacked
from codefend.attacks.trace import Trace
from codefend.core.images import quantize8
from codefend.types import Budget, Example, Objective, Victim


@dataclass(frozen=True)
class AttackGoal:
    """What an attack wants on a batch of examples, whichever victim, bare or defended, it goes through.

    ``clean`` ``[B, 3, H, W]``; ``target`` is the sentence that a targeted attack forces; ``other_images``
    ``[B, 3, H, W]`` are those whose features ``feature-target`` imitates; ``reference`` is the undefended victim whose
    features and words count as clean, by default those of the attacked victim.
    """

    spec: AttackSpec | TextAttackSpec
    examples: Sequence[Example]
    clean: Tensor
    target: str = ""
    other_images: Tensor | None = None
    reference: Victim | None = None

    @property
    def prompts(self) -> list[str]:
        return [example.prompt for example in self.examples]

    @property
    def answers(self) -> list[str]:
        return [true_answer(example) for example in self.examples]

    def objective(self, victim: Victim) -> Objective:
        """The objective through ``victim``: images ``[B, 3, H, W]`` to ``[B]``, lower is better for the attacker.

        Raises CodefendError when the attack needs a capability, a target or other images that are not there.
        """
        if isinstance(self.spec, TextAttackSpec):
            return self.prompt_objective(victim)(self.prompts)
        texts = (self.prompts, self.answers, self.target)
        images = (self.clean, self.other_images)
        return objective_for(self.spec, victim, *texts, *images, reference=self.reference)

    def prompt_objective(self, victim: Victim) -> PromptObjective:
        """The same for an attack on words: prompts to an objective of images."""
        assert isinstance(self.spec, TextAttackSpec)
        return prompt_objective_for(self.spec, victim, self.answers, self.target)


@dataclass(frozen=True)
class AttackResult:
    """``images`` ``[B, 3, H, W]`` are 8-bit and inside the attack's bound; ``raw`` is what the attack returned."""

    images: Tensor
    prompts: list[str]
    raw: Tensor
    trace: Trace
    seconds: float  # per image


def attack_batch(
    attack: Any,
    goal: AttackGoal,
    victim: Victim,
    budget: Budget,
    *,
    generator: Generator,
    objective: Objective | None = None,
) -> AttackResult:
    """Attack ``goal``'s clean images (or prompts, or both) through ``victim``.

    ``attack`` is what ``goal.spec.build`` returned; ``objective`` replaces the goal's own, as evasion does.
    """
    trace, prompts = Trace(), goal.prompts
    trace.attach(attack)
    start = time.perf_counter()
    if isinstance(goal.spec, TextAttackSpec):
        raw, prompts = attack(goal.prompt_objective(victim), goal.clean, prompts, budget, generator=generator)
    else:
        raw = attack(objective or goal.objective(victim), goal.clean, budget, generator=generator)
    seconds = (time.perf_counter() - start) / len(goal.examples)
    raw = raw.detach()
    images = quantize_attacked(attack, raw.nan_to_num(0.5), goal.clean, budget)
    return AttackResult(images, list(prompts), raw, trace, seconds)


def clean_images(examples: Sequence[Example]) -> Tensor:
    """``[B, 3, H, W]``, rounded to 8 bits as an upload is."""
    return quantize8(torch.stack([example.image for example in examples]))


def other_images(examples: Sequence[Example], indices: Sequence[int], clean: Tensor) -> Tensor:
    """For each index the image half of ``examples`` away, resized to ``clean``: what ``feature-target`` imitates."""
    count = len(examples)
    images = [examples[(index + max(count // 2, 1)) % count].image for index in indices]
    return torch.cat([F.interpolate(quantize8(image)[None], clean.shape[-2:]) for image in images])


def true_answer(example: Example) -> str:
    """The most frequent reference, the first of equals."""
    return max(example.references, key=example.references.count)


def evaluate_objective(objective: Objective, images: Tensor) -> list[float]:
    """The objective of each image, without gradients."""
    with torch.no_grad():
        return [float(value) for value in objective(images).tolist()]
