"""What a row records of its attack: size of the perturbation, violations of the budget, loss curve, gradient health."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codefend.attacks.bounds import OwnBound
from codefend.attacks.norms import distance
from codefend.attacks.specs import restarts_of
from codefend.attacks.trace import Trace
from codefend.bench.attacking import AttackResult
from codefend.core.runs import Row
from codefend.tasks.image_metrics import psnr
from codefend.types import Budget

SLACK = 1e-5  # float32 rounding of an attack's projection, pixel units
TAIL, LATE = 0.1, 0.05  # converged: the last tenth of the steps brought at most 5% of the gain


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
