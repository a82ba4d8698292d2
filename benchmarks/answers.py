"""Captions and questions behind each defense, oblivious (T0) and adaptive (T2), on a stratified subset of the scenes.

The subset takes images evenly by the number of objects, and questions evenly by kind. T0 attacks the undefended victim;
T2 attacks through the defense, with fresh noise in every pass. An attack takes steps on the word scores of the vision
tokens first, then steps on the language-model loss of the true answer. Step lengths decay from eps to eps / 20, with
momentum .75; the iterate with the lowest averaged objective is rounded to 8 bits and answered several times.

    python benchmarks/answers.py ROWS.jsonl --defenses none bridge runs/robust/weights --t2 4 --count 12

Rows are appended to ROWS.jsonl; rerun the command to resume.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from codefend import tasks, victims
from codefend.attacks import objectives
from codefend.attacks.norms import quantize_in_budget, random_start
from codefend.core.runs import make_generator
from codefend.defense import DefendedVictim, Defense
from codefend.tasks.metrics import all_tags, vqa_accuracy
from codefend.training.frozen import WORDS
from codefend.types import Budget, Example, Objective

DRAWS = 3  # answers per image where the defense draws noise
MOMENTUM = 0.75


def subset(examples: Sequence[Example], count: int) -> list[Example]:
    """``count`` examples, evenly of each stratum: number of objects in the image, or kind of question."""
    strata = defaultdict(list)
    for example in examples:
        strata[len(example.tags) if example.tags else example.kind].append(example)
    groups = [group for _, group in sorted(strata.items(), key=lambda item: str(item[0]))]
    chosen = []
    for turn in range(count):
        group = groups[turn % len(groups)]
        chosen.append(group[(turn // len(groups)) * (len(group) * len(groups) // count)])
    return chosen


def word_objective(victim: Any, undefended: Any, clean: Tensor) -> Objective:
    """Away from the words that the undefended victim reads in each vision token of the clean images."""
    with torch.no_grad():
        labels = undefended.word_scores(clean, WORDS).argmax(-1)
    return lambda images: -objectives.word_loss(victim.word_scores(images, WORDS), labels)


def descend(objective: Objective, start: Tensor, clean: Tensor, budget: Budget) -> Tensor:
    """Sign steps with momentum; the iterate with the lowest averaged objective."""
    images, velocity = start, torch.zeros_like(start)
    best, least = start, torch.full((len(start),), torch.inf)
    for step in range(budget.steps):
        images = images.detach().requires_grad_(True)
        total, grad = torch.zeros(len(images)), torch.zeros_like(images)
        for _ in range(budget.eot):
            losses = objective(images)
            grad += torch.autograd.grad(losses.sum(), images)[0]
            total += losses.detach()
        better = total < least
        least = torch.where(better, total, least)
        best = torch.where(better.view(-1, 1, 1, 1), images.detach(), best)
        length = budget.eps * 0.05 ** (step / max(1, budget.steps - 1))
        velocity = MOMENTUM * velocity + grad / grad.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
        images = images.detach() - length * velocity.sign()
        images = torch.minimum(torch.maximum(images, clean - budget.eps), clean + budget.eps).clamp(0, 1)
    return best


def attack(victim: Any, undefended: Any, examples: Sequence[Example], eps: int, args: argparse.Namespace) -> Tensor:
    """Steps on the words, then on the language-model loss from their result, ``[B, 3, H, W]`` in 8 bits."""
    clean = torch.stack([example.image for example in examples])
    budget = Budget(eps=eps / 255, steps=args.word_steps, eot=args.eot)
    start = random_start(clean, budget, generator=make_generator(0, "answers", eps))
    start = descend(word_objective(victim, undefended, clean), start, clean, budget)
    prompts, answers = [e.prompt for e in examples], [e.references[0] for e in examples]
    budget = Budget(eps=eps / 255, steps=args.steps, eot=args.eot)
    images = descend(objectives.untargeted(victim, prompts, answers), start, clean, budget)
    return quantize_in_budget(images, clean, budget)


def score(victim: Any, images: Tensor, examples: Sequence[Example], draws: int) -> list[float]:
    """Mean score of each image over ``draws`` answers."""
    metric = all_tags if examples[0].tags else vqa_accuracy
    prompts = [example.prompt for example in examples]
    scores = [metric(victim.generate(images, prompts), examples) for _ in range(draws)]
    return [float(x) for x in torch.stack(scores).float().mean(0)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--defenses", nargs="+", default=["none", "bridge"])
    parser.add_argument("--tasks", nargs="+", default=["caption", "vqa"])
    parser.add_argument("--t0", type=int, nargs="*", default=[8], help="eps of the oblivious attacks, in 1/255")
    parser.add_argument("--t2", type=int, nargs="*", default=[4], help="eps of the adaptive attacks, in 1/255")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--steps", type=int, default=15, help="on the language-model loss")
    parser.add_argument("--word-steps", type=int, default=15)
    parser.add_argument("--eot", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    keys = {json.loads(line)["key"] for line in args.rows.read_text().splitlines()} if args.rows.exists() else set()
    undefended = victims.load("pocket")
    oblivious: dict[tuple[str, int], Tensor] = {}
    for spec in args.defenses:
        defense = Defense.from_spec(spec)
        victim = DefendedVictim(undefended, defense)
        for task in args.tasks:
            examples = subset(tasks.load(task).examples, args.count)
            for threat, eps in threats(args, defense):
                cell = {"task": task, "defense": spec, "threat": threat, "eps": eps}
                names = ["|".join(map(str, (*cell.values(), example.id))) for example in examples]
                if keys.issuperset(names):
                    continue
                images = torch.stack([example.image for example in examples])
                if threat == "T0":
                    if (task, eps) not in oblivious:
                        oblivious[task, eps] = attack(undefended, undefended, examples, eps, args)
                    images = oblivious[task, eps]
                elif threat == "T2":
                    images = attack(victim, undefended, examples, eps, args)
                scores = score(victim, images, examples, DRAWS if defense.purifier else 1)
                with args.rows.open("a") as file:
                    for name, example, value in zip(names, examples, scores, strict=True):
                        row = {"key": name, **cell, "id": example.id, "kind": example.kind, "score": value}
                        file.write(json.dumps(row) + "\n")
                print(task, spec, threat, eps, f"{fmean(scores):.3f}", flush=True)


def threats(args: argparse.Namespace, defense: Defense) -> list[tuple[str, int]]:
    """Clean, oblivious, and adaptive where there is a purifier to attack through."""
    adaptive = args.t2 if defense.purifier else []
    return [("clean", 0), *(("T0", eps) for eps in args.t0), *(("T2", eps) for eps in adaptive)]


if __name__ == "__main__":
    main()
