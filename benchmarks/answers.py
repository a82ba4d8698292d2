"""Captions and questions behind each defense, oblivious (T0) and adaptive (T2), on a stratified subset of the scenes.

The subset takes images evenly by the number of objects, and questions evenly by kind. T0 attacks the undefended victim;
T2 attacks through the defense, with fresh noise in every pass. An attack takes steps on the word scores of the vision
tokens first (where a victim has none, on cosines of the tokens to embeddings of words), then, where an answer is still
correct, steps on the language-model loss of the true answer. Step lengths decay from eps to eps / 20, with momentum
.75; the iterate with the lowest averaged objective is rounded to 8 bits and answered several times. The score of an
image is that under the stronger of the two stages. An image that is never answered correctly counts as broken at larger
radii, too, since their budgets contain it.

    python benchmarks/answers.py ROWS.jsonl --defenses none bridge runs/robust/weights --t2 2 4 --count 32
    python benchmarks/answers.py ROWS.jsonl --victim smolvlm-pocket --sample first --t0 --t2 4 8 --word-steps 40

Rows are appended to ROWS.jsonl, all defenses for the first ``--batch`` images, then for the next; rerun the command to
resume. ``--summary`` prints n and mean of every cell instead; ``--results results/answers.json`` writes them as
published figures, with the command as given. Publish when all cells have the same n.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codefend import tasks, victims
from codefend.attacks import objectives
from codefend.attacks.norms import quantize_in_budget, random_start
from codefend.core.seeds import make_generator
from codefend.defense import DefendedVictim, Defense
from codefend.prompts.soft import open_weight
from codefend.tasks.metrics import all_tags, vqa_accuracy
from codefend.training.frozen import WORDS
from codefend.types import Budget, Example, HasWordScores, Objective

DRAWS = 3  # answers per image where the defense draws noise
MOMENTUM = 0.75
ANOTHER_VICTIM = {"clean": "adaptive", "T0": "oblivious", "T2": "adaptive"}  # in ids; adaptive/0: clean


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


def choose(examples: Sequence[Example], args: argparse.Namespace) -> Sequence[Example]:
    """The test images of ``--sample``."""
    return subset(examples, args.count) if args.sample == "strata" else examples[: args.count]


def word_objective(victim: Any, undefended: Any, clean: Tensor) -> Objective:
    """Away from the words that the undefended victim reads in each vision token of the clean images.

    Where a victim has no word scores, cosines of its tokens to the mean embedding of each word take their place.
    """
    table = None
    if not isinstance(undefended, HasWordScores):
        table = F.normalize(torch.stack([e.mean(0) for e in open_weight(undefended).embed(WORDS)]), dim=-1)

    def scores(model: Any, images: Tensor) -> Tensor:
        if table is None:
            return torch.as_tensor(model.word_scores(images, WORDS))
        return F.normalize(model.features(images), dim=-1) @ table.T

    with torch.no_grad():
        labels = scores(undefended, clean).argmax(-1)
    return lambda images: -objectives.word_loss(scores(victim, images), labels)


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


def attack(
    victim: DefendedVictim, undefended: Any, examples: Sequence[Example], eps: int, args: argparse.Namespace
) -> Tensor:
    """Steps on the words, then on the language-model loss from their result, ``[B, 3, H, W]`` in 8 bits."""
    clean = torch.stack([example.image for example in examples])
    purifier = victim.defense.purifier
    budget = Budget(eps=eps / 255, steps=args.word_steps, eot=args.eot if purifier and purifier.stochastic else 1)
    start = random_start(clean, budget, generator=make_generator(0, "answers", eps))
    images = quantize_in_budget(descend(word_objective(victim, undefended, clean), start, clean, budget), clean, budget)
    scores = score(victim, images, examples) if purifier else [1.0] * len(images)  # T0: both stages on every image
    left = [i for i, value in enumerate(scores) if value > 0]
    if not left:
        return images
    rest, budget = [examples[i] for i in left], replace(budget, steps=args.steps)
    objective = objectives.untargeted(victim, [e.prompt for e in rest], [e.references[0] for e in rest])
    images[left] = quantize_in_budget(descend(objective, images[left], clean[left], budget), clean[left], budget)
    return images


def score(victim: DefendedVictim, images: Tensor, examples: Sequence[Example]) -> list[float]:
    """Mean score of each image over its answers."""
    metric = all_tags if examples[0].tags else vqa_accuracy
    prompts = [example.prompt for example in examples]
    purifier = victim.defense.purifier
    draws = DRAWS if purifier and purifier.stochastic else 1
    scores = [metric(victim.generate(images, prompts), examples) for _ in range(draws)]
    return [float(x) for x in torch.stack(scores).float().mean(0)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--defenses", nargs="+", default=["none", "bridge"])
    parser.add_argument("--victim", default="pocket")
    parser.add_argument("--tasks", nargs="+", default=["caption", "vqa"])
    parser.add_argument("--sample", choices=["strata", "first"], default="strata", help="which of the test images")
    parser.add_argument("--t0", type=int, nargs="*", default=[8], help="eps of the oblivious attacks, in 1/255")
    parser.add_argument("--t2", type=int, nargs="*", default=[4], help="eps of the adaptive attacks, in 1/255")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="images attacked together")
    parser.add_argument("--steps", type=int, default=15, help="on the language-model loss")
    parser.add_argument("--word-steps", type=int, default=15)
    parser.add_argument("--eot", type=int, default=2, help="noise samples per step, where the defense draws noise")
    parser.add_argument(
        "--after", type=Path, help="rows of a weaker attack: attack what it left, the lower score counts"
    )
    parser.add_argument("--summary", action="store_true", help="print the means of the rows and stop")
    parser.add_argument("--results", type=Path, help="write the means of the rows and stop")
    return parser.parse_args()


class Rows:
    """The file of rows, one for each image and cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores = {row["key"]: row["score"] for row in read(path)}

    def keys(self, cell: dict[str, Any], examples: Sequence[Example]) -> list[str]:
        return ["|".join(map(str, (*cell.values(), example.id))) for example in examples]

    def complete(self, cell: dict[str, Any], examples: Sequence[Example]) -> bool:
        return self.scores.keys() >= set(self.keys(cell, examples))

    def add(self, cell: dict[str, Any], examples: Sequence[Example], scores: Sequence[float]) -> None:
        keys = self.keys(cell, examples)
        with self.path.open("a") as file:
            for key, example, value in zip(keys, examples, scores, strict=True):
                file.write(
                    json.dumps({"key": key, **cell, "id": example.id, "kind": example.kind, "score": value}) + "\n"
                )
        self.scores |= dict(zip(keys, scores, strict=True))
        print(*cell.values(), f"{fmean(scores):.3f}", flush=True)


class Measurement:
    """Cells of one batch of images: clean, oblivious and adaptive scores of every defense."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows, self.undefended = args, Rows(args.rows), victims.load_white_box(args.victim)
        self.earlier = {row["key"]: row["score"] for row in read(args.after)} if args.after else {}
        self.defended = {spec: DefendedVictim(self.undefended, Defense.from_spec(spec)) for spec in args.defenses}

    def measure(self, task: str, examples: Sequence[Example]) -> None:
        oblivious: dict[int, Tensor] = {}
        for spec, victim in self.defended.items():
            for threat, eps in threats(self.args, victim.defense):
                cell = {"task": task, "defense": spec, "threat": threat, "eps": eps}
                if self.rows.complete(cell, examples):
                    continue
                if threat == "T2":
                    scores = self.adaptive(victim, cell, examples)
                else:
                    images = torch.stack([example.image for example in examples])
                    if eps and eps not in oblivious:
                        bare = DefendedVictim(self.undefended, Defense())
                        oblivious[eps] = attack(bare, self.undefended, examples, eps, self.args)
                    scores = score(victim, oblivious.get(eps, images), examples)
                self.rows.add(cell, examples, scores)

    def adaptive(self, victim: DefendedVictim, cell: dict[str, Any], examples: Sequence[Example]) -> list[float]:
        """Scores of the images attacked through the defense; 0 for those that `--after` or a smaller radius broke."""
        smaller = [{**cell, "threat": "T2", "eps": eps} for eps in self.args.t2 if eps < cell["eps"]]
        smaller.append({**cell, "threat": "clean", "eps": 0})
        keys = zip(*(self.rows.keys(other, examples) for other in smaller), strict=True)
        earlier = [self.earlier.get(key, 1.0) for key in self.rows.keys(cell, examples)]
        alive = [min(self.rows.scores.get(key, 1.0) for key in group) > 0 for group in keys]
        alive = [is_alive and value > 0 for is_alive, value in zip(alive, earlier, strict=True)]
        rest = [example for example, is_alive in zip(examples, alive, strict=True) if is_alive]
        if not rest:
            return [0.0] * len(examples)
        attacked = iter(score(victim, attack(victim, self.undefended, rest, cell["eps"], self.args), rest))
        return [min(value, next(attacked)) if is_alive else 0.0 for is_alive, value in zip(alive, earlier, strict=True)]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_cells(path: Path) -> dict[tuple[str, str, int, str], list[float]]:
    """Scores by defense, threat model, radius and task, of the images that all cells of a defense and task have."""
    rows = read(path)
    images: dict[tuple[str, str], dict[tuple[str, int], set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        images[row["defense"], row["task"]][row["threat"], row["eps"]].add(row["id"])
    cells = defaultdict(list)
    for row in rows:
        if row["id"] in set.intersection(*images[row["defense"], row["task"]].values()):
            cells[row["defense"], row["threat"], row["eps"], row["task"]].append(row["score"])
    return cells


def summarize(cells: dict[tuple[str, str, int, str], list[float]]) -> None:
    """Print n and mean of every cell."""
    for (defense, threat, eps, task), scores in cells.items():
        print(f"{defense:24} {threat:5} {eps}/255 {task:7} n={len(scores)} {fmean(scores):.3f}")


def write_results(cells: dict[tuple[str, str, int, str], list[float]], args: argparse.Namespace) -> None:
    """Write the means as a file of results/, for `tools/render_results.py`."""
    words = [word for word in sys.argv[1:] if word not in ("--results", str(args.results))]
    rows = []
    for (defense, threat, eps, task), scores in cells.items():
        place = "clean-strata" if threat == "clean" else f"{threat}/words-then-loss/{eps}"
        if args.victim != "pocket":
            defense, place = f"{args.victim}:{defense}", f"{ANOTHER_VICTIM[threat]}/{eps}"
        rows.append({"id": f"{defense}/{place}/{task}", "value": round(fmean(scores), 4), "n": len(scores)})
    run = {
        "source": None,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/answers.py", "ROWS.jsonl", *words[1:]]),
        "n": max(row["n"] for row in rows),
        "unit": "share",
        "attack": "word scores, then the language-model loss where an answer was still correct",
        "note": f"{args.sample} images; n of each task, one start each, three draws of the noise",
        "seed": 0,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "rows": rows,
    }
    about = "Captions and questions under an attack in two stages, on a stratified subset of the frozen test images."
    args.results.write_text(json.dumps({"about": about, "runs": [run]}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    if args.results:
        cells = {key: scores for key, scores in read_cells(args.rows).items() if key[0] in args.defenses}
        return write_results(cells, args)
    if args.summary:
        return summarize(read_cells(args.rows))
    measurement = Measurement(args)
    chosen = {task: choose(tasks.load(task).examples, args) for task in args.tasks}
    for first in range(0, args.count, args.batch):
        for task, examples in chosen.items():
            measurement.measure(task, examples[first : first + args.batch])


def threats(args: argparse.Namespace, defense: Defense) -> list[tuple[str, int]]:
    """Clean, oblivious, and adaptive, small radii first, where there is a purifier to attack through."""
    adaptive = sorted(args.t2) if defense.purifier else []
    return [("clean", 0), *(("T0", eps) for eps in args.t0), *(("T2", eps) for eps in adaptive)]


if __name__ == "__main__":
    main()
