"""Every attack against random noise of the same budget, on the undefended pocket, as Markdown.

    python benchmarks/attacks.py [ATTACK ...] --run DIR [--task caption] [--limit 64] [--steps 100] [--queries 1000]
        [--batch 16] [--minutes M]

Every finished attack is stored in the run folder: rerun the command to resume and to print the whole table. Noise is
the best of ten draws inside the attack's bound by the attack's own objective. The control of attacks on words is one
random edit without a search, or another sentence than the attacker's. A row says no if the attack's mean objective is
not below that of the noise.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from codefend import tasks, victims
from codefend.attacks import (
    EVERY_ATTACK,
    NEEDS_SENTENCE,
    AttackSpec,
    TextAttackSpec,
)
from codefend.attacks.base import BestImages, PromptObjective
from codefend.attacks.corruptions import RandomNoise
from codefend.attacks.norms import excess, quantize_attacked, random_signs, uniform
from codefend.attacks.patch import AdversarialPatch
from codefend.attacks.stadv import StAdv, warp
from codefend.bench.attacking import AttackGoal, attack_batch, clean_images
from codefend.bench.tasks import same_size_batches
from codefend.contrib.attacks.perc_al import PerCAL, shrink
from codefend.core.images import quantize8
from codefend.core.runs import open_run
from codefend.core.seeds import make_generator
from codefend.tasks.metrics import targeted_success
from codefend.types import Budget, CodefendError, Objective, Task, WhiteBox

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
    """Outcome of one attack and of its control."""

    steps: int
    noise: Outcome = field(default_factory=Outcome)
    attacked: Outcome = field(default_factory=Outcome)
    seconds: float = 0.0
    broken: int = 0  # images outside the attack's bound


@dataclass(frozen=True)
class Settings:
    """What the figures depend on, saved in the run folder."""

    task: str
    limit: int
    steps: int
    queries: int
    batch: int
    eps: float


def evaluated(objective: Objective, images: Tensor) -> Tensor:
    with torch.no_grad():
        return objective(images)


def image_control(attack: object, objective: Objective, clean: Tensor, budget: Budget, generator: Generator) -> Tensor:
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


def run_attack(
    spec: AttackSpec | TextAttackSpec, victim: WhiteBox, task: Task, budget: Budget, size: int, noise: Outcome | None
) -> Row:
    """One attack on every batch; ``noise``: the outcome of noise under the same goal and bound, if measured before."""
    row, others = Row(budget.steps, noise or Outcome()), tasks.load(task.name).examples
    for number, indices in enumerate(same_size_batches(task.examples, size)):
        examples = [task.examples[index] for index in indices]
        clean = clean_images(examples)
        if spec.goal == "answer":  # a victim that only answers: the attacker knows its answer
            answers = victim.generate(clean, [example.prompt for example in examples])
            examples = [replace(e, references=(answer,)) for e, answer in zip(examples, answers, strict=True)]
        half = len(others) // 2
        targets = clean_images([others[(index + half) % len(others)] for index in indices])
        goal = AttackGoal(spec, examples, clean, task.target, targets)
        attack = spec.build(task.target) if isinstance(spec, TextAttackSpec) else spec.build()
        result = attack_batch(attack, goal, victim, budget, generator=make_generator(0, spec.name, number))
        row.seconds += result.seconds * len(examples)
        row.attacked.add(*judge(goal, victim, result.images, result.prompts))
        if isinstance(spec, AttackSpec):
            row.broken += int((excess(attack, result.images, clean, budget) > 1e-5).sum())
        if noise is None:
            row.noise.add(*judge(goal, victim, *control(attack, goal, victim, budget, number)))
    return row


def judge(goal: AttackGoal, victim: WhiteBox, images: Tensor, prompts: list[str]) -> tuple[Tensor, list[str]]:
    """The objective of each image and the victim's answers."""
    examples = [replace(example, prompt=prompt) for example, prompt in zip(goal.examples, prompts, strict=True)]
    objective = replace(goal, examples=examples).objective(victim)
    return evaluated(objective, images), victim.generate(images, prompts)


def control(attack: Any, goal: AttackGoal, victim: WhiteBox, budget: Budget, number: int) -> tuple[Tensor, list[str]]:
    """Images and prompts of the control of one batch: noise, or one random edit of the prompts."""
    generator = make_generator(0, "noise", number)
    if isinstance(goal.spec, TextAttackSpec):
        return text_control(goal.spec, goal.prompt_objective(victim), goal.clean, goal.prompts, budget, generator)
    noise = image_control(attack, goal.objective(victim), goal.clean, budget, generator)
    return quantize_attacked(attack, noise, goal.clean, budget), goal.prompts


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


def line(name: str, row: dict[str, Any], task: Task, clean: list[str]) -> str:
    """One attack of the table, from its row in the run folder."""
    spec = EVERY_ATTACK[name]
    if "error" in row:
        return f"| {name} | | {spec.goal} | | | | | | | {row['error']} | |"
    noise, attacked = row["noise"], row["attacked"]
    headline = task.metrics[task.headline]
    before, after = (float(headline(part["answers"], task.examples).nanmean()) for part in (noise, attacked))
    target = "-"
    if spec.goal in NEEDS_SENTENCE:
        reached = targeted_success(task.target, clean)
        target = f"{float(reached(attacked['answers'], task.examples).nanmean()):.2f}"
    of_noise, of_attack = (sum(part["objective"]) / len(part["objective"]) for part in (noise, attacked))
    cost = 1000 * row["seconds"] / len(attacked["answers"]) / row["steps"]
    bound = spec.changes if isinstance(spec, TextAttackSpec) else spec.bound
    verdict = "**outside**" if row["broken"] else "yes" if of_attack < of_noise else "**no**"
    return (
        f"| {name} | {bound} | {spec.goal} | {row['steps']} | {before:.2f} | {after:.2f} | {target} "
        f"| {of_noise:.3f} | {of_attack:.3f} | {verdict} | {cost:.1f} |"
    )


def measure(name: str, victim: WhiteBox, task: Task, settings: Settings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one attack; ``rows`` are those in the run folder."""
    spec = EVERY_ATTACK[name]
    limit = settings.steps if spec.threat == "white-box" else settings.queries if spec.threat == "score" else 0
    # The templates and places of an attack that only plants a sentence are few: all are tried.
    steps = spec.steps if spec.threat == "score" and spec.steps < 10 else limit or spec.steps
    budget = Budget("linf", settings.eps / 255, steps)
    kind = None if isinstance(spec, TextAttackSpec) else [spec.goal, spec.bound]
    same = (row["noise"] for row in rows if kind and row.get("alike") == kind and "noise" in row)
    noise = next((Outcome(**outcome) for outcome in same), None)
    try:
        row = run_attack(spec, victim, task, budget, settings.batch, noise)
    except CodefendError as error:
        return {"key": name, "error": str(error)}
    return {"key": name, "alike": kind, **asdict(row)}


def table(settings: Settings, task: Task, rows: list[dict[str, Any]]) -> None:
    """Print the whole table, and what it lacks."""
    clean = next(row["answers"] for row in rows if row["key"] == "no attack")
    score = float(task.metrics[task.headline](clean, task.examples).nanmean())
    by_name = {row["key"]: row for row in rows}
    print(
        f"{settings.task}, n = {len(clean)}, {task.headline} without attack {score:.2f}, l-inf {settings.eps:g}/255\n"
    )
    print(
        f"| attack | bound | goal | steps | {task.headline}, noise | attacked | target | objective, noise | attacked "
        "| beats noise | ms per image and step |\n" + "|---" * 11 + "|"
    )
    for name in EVERY_ATTACK:
        if name in by_name:
            print(line(name, by_name[name], task, clean))
    missing = [name for name in EVERY_ATTACK if name not in by_name]
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
    args = vars(parser.parse_args())
    sized = [name for name, spec in EVERY_ATTACK.items() if spec.goal != "hidden-image"]  # those: benchmarks/scaling.py
    names, folder = args.pop("names") or sized, args.pop("run")
    deadline = time.monotonic() + 60 * args.pop("minutes")
    settings = Settings(**args)
    task = tasks.load(settings.task, limit=settings.limit)
    with open_run(folder, settings) as run:
        missing = [name for name in names if not run.has(name)]
        victim = victims.load_white_box("pocket") if missing or not run.has("no attack") else None
        if victim is not None and not run.has("no attack"):
            answers: list[str] = []
            for indices in same_size_batches(task.examples, settings.batch):
                examples = [task.examples[index] for index in indices]
                answers += victim.generate(clean_images(examples), [example.prompt for example in examples])
            run.append({"key": "no attack", "answers": answers})
        for name in missing:
            if victim is None or time.monotonic() > deadline:
                break
            run.append(measure(name, victim, task, settings, run.rows()))
            print(f"{name} done", file=sys.stderr, flush=True)
        table(settings, task, run.rows())


if __name__ == "__main__":
    main()
