"""One batch under one attack: its goal, the finished 8-bit images, and what a row records of it.

The grid and prompt search share it:

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

from codefend.attacks import AttackSpec, TextAttackSpec
from codefend.attacks.base import PromptObjective, Trace
from codefend.attacks.norms import OwnBound, distance, quantize_attacked
from codefend.attacks.objectives import objective_for, prompt_objective_for
from codefend.attacks.specs import restarts_of
from codefend.core.images import quantize8
from codefend.core.runs import Row
from codefend.tasks.metrics import psnr
from codefend.types import Budget, Example, Objective, Victim

SLACK = 1e-5  # float32 rounding of an attack's projection, pixel units
TAIL, LATE = 0.1, 0.05  # converged: the last tenth of the steps brought at most 5% of the gain


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


# --- what a row records of its attack ---------------------------------------------------------------------------------


def attack_notes(attack: object, result: AttackResult, clean: Tensor, budget: Budget) -> list[Row]:
    """One note per example on how its attacked image was made."""
    columns = (
        result.prompts,
        perturbations(result.images, clean),
        violations(result.raw, result.images, clean, budget, attack),
        curves(result.trace.losses, len(clean)),
        gradients(result.trace, len(clean)),
    )
    spent = spent_budget(attack, budget)
    return [
        {
            "skipped": False,
            "asked": prompt,
            "perturbation": size,
            "violation": problem,
            "curve": curve,
            "gradient": gradient,
            "seconds": result.seconds,
            "budget": dict(spent),
        }
        for prompt, size, problem, curve, gradient in zip(*columns, strict=True)
    ]


def spent_budget(attack: object, budget: Budget) -> Row:
    """What the attack may spend on an example, as notes record it."""
    return {"steps": budget.steps, "eot": budget.eot, "restarts": restarts_of(attack)}


def skipped_note() -> Row:
    """The note on an example that was not attacked."""
    return {"skipped": True, "perturbation": {"linf": 0.0, "l2": 0.0, "psnr": None}, "violation": "", "seconds": 0.0}


def perturbations(attacked: Tensor, clean: Tensor) -> list[Row]:
    """The distance of each image from the clean one, in pixel units and dB."""
    linf, l2 = distance(attacked, clean, "linf").tolist(), distance(attacked, clean, "l2").tolist()
    return [{"linf": a, "l2": b, "psnr": c} for a, b, c in zip(linf, l2, psnr(attacked, clean).tolist(), strict=True)]


def violations(raw: Tensor, attacked: Tensor, clean: Tensor, budget: Budget, attack: object) -> list[str]:
    """How each attacked image breaks its budget, before rounding and after; "" if it doesn't.

    ``attack`` says where it has a bound of its own.
    """
    problems = []
    for before, after, original in zip(raw, attacked, clean, strict=True):
        stages = [("the attack's image", before), ("the 8-bit image", after)]
        parts = [_problem(name, image, original, budget, attack) for name, image in stages]
        problems.append("; ".join(part for part in parts if part))
    return problems


def _problem(name: str, image: Tensor, clean: Tensor, budget: Budget, attack: object) -> str:
    if not bool(image.isfinite().all()):
        return f"{name} is not finite"
    if float(image.min()) < -SLACK or float(image.max()) > 1 + SLACK:
        return f"{name} leaves [0, 1]: {float(image.min()):.4f} to {float(image.max()):.4f}"
    if isinstance(attack, OwnBound):
        over = float(attack.outside(image[None], clean[None]))
        return f"{name} is outside the attack's own bound by {over:.5f}" if over > SLACK else ""
    far = float(distance(image[None], clean[None], budget.norm))
    if far > budget.eps * (1 + 1e-4) + SLACK:
        return f"{name} is {far:.5f} away ({budget.norm}), the budget is {budget.eps:.5f}"
    return ""


def curves(losses: Sequence[Tensor], count: int) -> list[Row | None]:
    """Per example: the objective at the start, its best value, and the last tenth's share of the gain."""
    if len(losses) < 2:
        return [None] * count
    table = torch.stack(list(losses)).double()  # [K, B]
    best = torch.where(table.isnan(), torch.inf, table).cummin(0).values
    mark = best[-1 - max(round(TAIL * (len(table) - 1)), 1)]
    gain = table[0] - best[-1]
    late = torch.where(gain > 1e-9, (mark - best[-1]) / gain, torch.zeros_like(gain))
    return [
        {"start": a, "end": b, "late": c, "converged": c <= LATE, "steps": len(table)}
        for a, b, c in zip(table[0].tolist(), best[-1].tolist(), late.tolist(), strict=True)
    ]


def gradients(trace: Trace, count: int) -> list[Row | None]:
    """Per example: range of the gradient's l2 norm, share of steps where it is zero, entries that are not finite."""
    if not trace.gradient_norms:
        return [None] * count
    norms = torch.stack(trace.gradient_norms).double()  # [G, B]
    columns = (norms.amin(0), norms.amax(0), norms.median(0).values, trace.zero_gradients().double())
    bad = torch.stack(trace.nonfinite).sum(0)
    names = ("min", "max", "median", "zero_share", "nonfinite")
    return [
        dict(zip(names, values, strict=True)) for values in zip(*(c.tolist() for c in (*columns, bad)), strict=True)
    ]
