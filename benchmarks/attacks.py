"""Every attack against random noise of the same budget, on the undefended pocket, as Markdown.

    python benchmarks/attacks.py [ATTACK ...] --run DIR [--task caption] [--limit 64] [--steps 100] [--queries 1000]
        [--batch 16] [--minutes M]

Every finished attack is kept in the run folder: the same command goes on where it stopped and prints the whole table.
Noise is the best of ten draws inside the attack's bound by the attack's own objective. Against text attacks stand one
random edit without a search, or another sentence than the attacker's. A row says no where the attack's mean objective
is not below the noise's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from codefend import tasks, victims
from codefend.attacks import (
    ATTACKS,
    NEEDS_SENTENCE,
    TEXT_ATTACKS,
    AttackSpec,
    TextAttackSpec,
    objective_for,
    prompt_objective_for,
)
from codefend.attacks.base import BestImages, PromptObjective
from codefend.attacks.bounds import excess, quantize_attacked
from codefend.attacks.noise import RandomNoise
from codefend.attacks.norms import random_signs, uniform
from codefend.attacks.patch import AdversarialPatch
from codefend.attacks.stadv import StAdv, warp
from codefend.contrib.attacks.perc_al import PerCAL, shrink
from codefend.core.images import quantize8
from codefend.core.runs import make_generator, open_run
from codefend.tasks.metrics import targeted_success
from codefend.types import Budget, CodefendError, Example, Objective, Task, WhiteBox

DRAWS = 10


@dataclass
class Outcome:
    """Objective and answer per example, batch after batch."""

    objective: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def add(self, objective: Tensor, answers: list[str]) -> None:
        self.objective += objective.tolist()
        self.answers += answers


@dataclass
class Row:
    """What one attack did and what noise does there."""

    steps: int
    noise: Outcome = field(default_factory=Outcome)
    attacked: Outcome = field(default_factory=Outcome)
    seconds: float = 0.0
    broken: int = 0  # images outside the attack's bound


@dataclass(frozen=True)
class Settings:
    """What the figures depend on: saved in the run folder, which takes no others."""

    task: str
    limit: int
    steps: int
    queries: int
    batch: int
    eps: float


def batches(task: Task, size: int) -> Iterator[tuple[Sequence[Example], Tensor]]:
    for start in range(0, len(task.examples), size):
        examples = task.examples[start : start + size]
        yield examples, quantize8(torch.stack([example.image for example in examples]))


def evaluated(objective: Objective, images: Tensor) -> Tensor:
    with torch.no_grad():
        return objective(images)


def control(attack: object, objective: Objective, clean: Tensor, budget: Budget, generator: Generator) -> Tensor:
    """The best of ten random images inside the attack's bound, by its objective."""
    if not isinstance(attack, AdversarialPatch | StAdv | PerCAL):
        return RandomNoise(draws=DRAWS)(objective, clean, budget, generator=generator)
    best = BestImages(clean, evaluated(objective, clean))
    mask = attack.mask(clean, generator=generator) if isinstance(attack, AdversarialPatch) else torch.zeros(1)
    for _ in range(DRAWS):
        if isinstance(attack, AdversarialPatch):
            trial = torch.where(mask > 0, uniform(clean, generator), clean)
        elif isinstance(attack, StAdv):
            reach = attack.limit * min(clean.shape[-2:])
            flow = uniform(clean, generator, shape=(len(clean), 2, *clean.shape[-2:]))
            trial = warp(clean, reach * (2 * flow - 1))
        else:
            far = clean + 32 / 255 * random_signs(clean, generator) * uniform(clean, generator)
            trial = shrink(far.clamp(0, 1), clean, attack.limit)
        best.update(trial, evaluated(objective, trial))
    return best.images


def run_image(spec: AttackSpec, victim: WhiteBox, task: Task, budget: Budget, size: int, known: Outcome | None) -> Row:
    """One attack on every batch; ``known``: what noise does under the same goal and bound, where it was looked at."""
    row, others = Row(budget.steps, known or Outcome()), tasks.load(task.name).examples
    for number, (examples, clean) in enumerate(batches(task, size)):
        prompts, answers = [e.prompt for e in examples], [e.references[0] for e in examples]
        if spec.goal == "answer":  # a victim that only answers: the attacker knows what it says
            answers = victim.generate(clean, prompts)
        first = number * size + len(others) // 2  # half the whole set away
        wanted = [quantize8(others[(first + i) % len(others)].image) for i in range(len(examples))]
        objective = objective_for(spec, victim, prompts, answers, task.target, clean, torch.stack(wanted))
        attack = spec.build()
        start = time.perf_counter()
        raw = attack(objective, clean, budget, generator=make_generator(0, spec.name, number))
        row.seconds += time.perf_counter() - start
        images = quantize_attacked(attack, raw, clean, budget)
        row.broken += int((excess(attack, images, clean, budget) > 1e-5).sum())
        row.attacked.add(evaluated(objective, images), victim.generate(images, prompts))
        if known is None:
            noise = control(attack, objective, clean, budget, make_generator(0, "noise", number))
            noise = quantize_attacked(attack, noise, clean, budget)
            row.noise.add(evaluated(objective, noise), victim.generate(noise, prompts))
    return row


def run_text(spec: TextAttackSpec, victim: WhiteBox, task: Task, budget: Budget, size: int) -> Row:
    row = Row(budget.steps)
    for number, (examples, clean) in enumerate(batches(task, size)):
        prompts, answers = [e.prompt for e in examples], [e.references[0] for e in examples]
        objective, generator = (
            prompt_objective_for(spec, victim, answers, task.target),
            make_generator(0, spec.name, number),
        )
        start = time.perf_counter()
        images, changed = spec.build(task.target)(objective, clean, prompts, budget, generator=generator)
        row.seconds += time.perf_counter() - start
        images = quantize8(images)
        row.attacked.add(evaluated(objective(changed), images), victim.generate(images, changed))
        noise, edited = text_control(spec, objective, clean, prompts, budget, make_generator(0, "noise", number))
        row.noise.add(evaluated(objective(edited), noise), victim.generate(noise, edited))
    return row


def text_control(
    spec: TextAttackSpec,
    objective: PromptObjective,
    clean: Tensor,
    prompts: list[str],
    budget: Budget,
    generator: Generator,
) -> tuple[Tensor, list[str]]:
    """Noise for a joint attack, another sentence for one that plants a sentence, else one random edit."""
    if spec.changes == "both":
        images = RandomNoise(draws=DRAWS)(objective(prompts), clean, budget, generator=generator)
        return quantize_attacked(RandomNoise(), images, clean, budget), prompts
    once = budget if spec.goal in NEEDS_SENTENCE else replace(budget, steps=1)
    images, edited = spec.build("")(objective, clean, prompts, once, generator=generator)
    return quantize8(images), edited


def line(name: str, found: dict[str, Any], task: Task, clean: list[str]) -> str:
    """One attack of the table, from its row in the run folder."""
    spec = EVERY[name]
    if "error" in found:
        return f"| {name} | | {spec.goal} | | | | | | | {found['error']} | |"
    noise, attacked = found["noise"], found["attacked"]
    headline = task.metrics[task.headline]
    before, after = (float(headline(part["answers"], task.examples).nanmean()) for part in (noise, attacked))
    target = "-"
    if spec.goal in NEEDS_SENTENCE:
        reached = targeted_success(task.target, clean)
        target = f"{float(reached(attacked['answers'], task.examples).nanmean()):.2f}"
    there, here = (sum(part["objective"]) / len(part["objective"]) for part in (noise, attacked))
    cost = 1000 * found["seconds"] / len(attacked["answers"]) / found["steps"]
    bound = getattr(spec, "bound", getattr(spec, "changes", ""))
    verdict = "**outside**" if found["broken"] else "yes" if here < there else "**no**"
    return (
        f"| {name} | {bound} | {spec.goal} | {found['steps']} | {before:.2f} | {after:.2f} | {target} "
        f"| {there:.3f} | {here:.3f} | {verdict} | {cost:.1f} |"
    )


def measure(name: str, victim: WhiteBox, task: Task, asked: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one attack; ``rows`` are those that the run has."""
    spec = EVERY[name]
    wish = asked.steps if spec.threat == "white-box" else asked.queries if spec.threat == "score" else 0
    # The templates and places of an attack that only plants a sentence are few, and all are tried.
    steps = spec.steps if spec.threat == "score" and spec.steps < 10 else wish or spec.steps
    budget = Budget("linf", asked.eps / 255, steps)
    try:
        if isinstance(spec, TextAttackSpec):
            row = run_text(spec, victim, task, budget, asked.batch)
        else:
            alike = (r for r in rows if r.get("alike") == [spec.goal, spec.bound] and "noise" in r)
            known = next((Outcome(**r["noise"]) for r in alike), None)
            row = run_image(spec, victim, task, budget, asked.batch, known)
    except CodefendError as error:
        return {"key": name, "error": str(error)}
    alike_key = None if isinstance(spec, TextAttackSpec) else [spec.goal, spec.bound]
    return {"key": name, "alike": alike_key, **asdict(row)}


EVERY: dict[str, AttackSpec | TextAttackSpec] = {**ATTACKS, **TEXT_ATTACKS}


def table(asked: Settings, task: Task, rows: list[dict[str, Any]]) -> None:
    """Print the whole table, and what it lacks."""
    clean = next(row["answers"] for row in rows if row["key"] == "no attack")
    plain, done = float(task.metrics[task.headline](clean, task.examples).nanmean()), {row["key"]: row for row in rows}
    print(f"{asked.task}, n = {len(clean)}, {task.headline} without attack {plain:.2f}, l-inf {asked.eps:g}/255\n")
    print(
        f"| attack | bound | goal | steps | {task.headline}, noise | attacked | target | objective, noise | attacked "
        "| beats noise | ms per image and step |\n" + "|---" * 11 + "|"
    )
    for name in EVERY:
        if name in done:
            print(line(name, done[name], task, clean))
    missing = [name for name in EVERY if name not in done]
    if missing:
        print(f"\nNot measured: {', '.join(missing)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="attacks; all if left out")
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--task", default="caption")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--steps", type=int, default=0, help="gradient steps; 0: each attack's usual number")
    parser.add_argument("--queries", type=int, default=0, help="of score attacks; 0: each attack's usual number")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--eps", type=float, default=8.0, help="l-inf radius in 1/255")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further attack after this long")
    given = vars(parser.parse_args())
    names, folder, limit = given.pop("names") or list(EVERY), given.pop("run"), time.monotonic() + 60 * given["minutes"]
    given.pop("minutes")
    asked = Settings(**given)
    task = tasks.load(asked.task, limit=asked.limit)
    with open_run(folder, asked) as run:
        todo = [name for name in names if not run.has(name)]
        victim = victims.load("pocket") if todo or not run.has("no attack") else None
        if not run.has("no attack"):
            shown = [victim.generate(x, [e.prompt for e in part]) for part, x in batches(task, asked.batch)]
            run.append({"key": "no attack", "answers": [answer for answers in shown for answer in answers]})
        for name in todo:
            if time.monotonic() > limit:
                break
            run.append(measure(name, victim, task, asked, run.rows()))
            print(f"{name} done", file=sys.stderr, flush=True)
        table(asked, task, run.rows())


if __name__ == "__main__":
    main()
