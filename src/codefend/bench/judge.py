"""Answers and scores: the defended victim looks at a batch of finished images, and each answer becomes a row."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from codefend.attacks import NEEDS_SENTENCE
from codefend.bench.adaptive import suspicion, unwrapped
from codefend.bench.craft import (
    Cell,
    Crafted,
    KnownSeed,
    as_asked,
    clean_images,
    evaluate_objective,
    judge_names,
    make_objective,
    origin,
    place,
)
from codefend.bench.results import BARE, CLEAN, eps_label
from codefend.bench.setup import Bench
from codefend.core import images as pictures
from codefend.core.devices import default_device
from codefend.core.runs import Row, make_generator
from codefend.defense import DefendedVictim, Defense
from codefend.tasks.answers import normalize_answer
from codefend.tasks.image_metrics import psnr
from codefend.tasks.metrics import targeted_success
from codefend.types import Example, Purifier


@dataclass
class Watched:
    """A purifier that remembers its last result and the seconds it took."""

    purifier: Purifier
    seconds: float = 0.0
    last: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        start = time.perf_counter()
        self.last = self.purifier(images, generator=generator)
        self.seconds += time.perf_counter() - start
        return self.last


@dataclass(frozen=True)
class Submissions:
    """Answers ``[N][B]`` to the same images submitted N times, what the victim saw first, and seconds per image."""

    answers: list[list[str]]
    purified: Tensor
    purify_seconds: float
    generate_seconds: float
    seed: int


def row_key(cell: Cell, label: str, example_id: str) -> str:
    """What tells a row from all others of its run."""
    return " | ".join((cell.task, cell.defense, cell.threat, cell.attack, label, example_id))


def submit(bench: Bench, cell: Cell, batch: int, images: Tensor, examples: Sequence[Example]) -> Submissions:
    """Ask the defended victim about ``images``: N times where it is randomized, with fresh noise each time."""
    names, randomized = judge_names(cell, batch), bench.contenders[cell.defense].randomized
    times = bench.config.resubmissions if randomized and cell.threat != "T2d" else 1
    defense, watched = judged_defense(bench, cell, batch), None
    if defense.purifier is not None:
        watched = Watched(defense.purifier)
        defense = Defense(watched, defense.policy, defense.name)
    prompts, answers, purified, seed = [e.prompt for e in examples], [], images, 0
    start = time.perf_counter()
    for turn in range(times):
        generator = make_generator(bench.config.seed, *names, turn)
        answers.append(DefendedVictim(bench.victim, defense, generator=generator).generate(images, prompts))
        if turn == 0:
            purified = images if watched is None else watched.last.to(images.device)
            seed = generator.initial_seed()
    total, purify = time.perf_counter() - start, 0.0 if watched is None else watched.seconds
    share = len(images) * times
    return Submissions(answers, purified, purify / share, (total - purify) / share, seed)


def judged_defense(bench: Bench, cell: Cell, batch: int) -> Defense:
    """The defense that answers in ``cell``; at T2d it draws the noise that the attacker knows."""
    defense = bench.contenders[cell.defense].defense
    if cell.threat != "T2d" or defense.purifier is None:
        return defense
    known = KnownSeed(defense.purifier, bench.config.seed, *judge_names(cell, batch), 0)
    return Defense(known, defense.policy, defense.name)


def score_all(bench: Bench, task: str, answers: list[list[str]], examples: Sequence[Example]) -> list[Row]:
    """Per example: scores of the first answer, and over N answers their mean, their worst, and of the majority's."""
    known = bench.tasks[task]
    each = [known.score(turn, examples) for turn in answers]
    votes = each[0] if len(answers) == 1 else known.score(_majority(answers), examples)
    stacked = {name: torch.stack([found[name] for found in each]).double() for name in each[0]}
    return [
        {
            "scores": {name: values[0, i].item() for name, values in stacked.items()},
            "mean_scores": {name: values[:, i].nanmean().item() for name, values in stacked.items()},
            "worst_scores": {name: values[:, i].min().item() for name, values in stacked.items()},
            "vote_scores": {name: values[i].item() for name, values in votes.items()},
        }
        for i in range(len(examples))
    ]


def _majority(answers: list[list[str]]) -> list[str]:
    """The most frequent answer of each example, the first of equals."""
    chosen = []
    for turns in zip(*answers, strict=True):
        counts = Counter(normalize_answer(answer) for answer in turns)
        top = max(counts.values())
        chosen.append(next(answer for answer in turns if counts[normalize_answer(answer)] == top))
    return chosen


def successes(bench: Bench, cell: Cell, submissions: Submissions, examples: Sequence[Example], clean: list[Row]) -> Row:
    """Columns ``success`` (first submission) and ``success_any`` (any of N), each a list with one entry per example."""
    known, choice = bench.tasks[cell.task], bench.attacks[cell.attack]
    before = torch.tensor([_number(row["scores"][known.judge]) for row in clean])
    metric = known.metrics[known.judge]
    found = {"untargeted": [known.broken(before, metric(turn, examples).to(before)) for turn in submissions.answers]}
    if choice.spec.goal in NEEDS_SENTENCE:
        reached = targeted_success(known.task.target, [row["answer"] for row in clean])
        found["targeted"] = [reached(turn, examples) for turn in submissions.answers]
    first = {kind: values[0].tolist() for kind, values in found.items()}
    most = {kind: torch.stack(values).amax(0).tolist() for kind, values in found.items()}
    return {"success": _transposed(first, len(examples)), "success_any": _transposed(most, len(examples))}


def _transposed(columns: dict[str, list[float]], count: int) -> list[Row]:
    return [{kind: _whole(values[i]) for kind, values in columns.items()} for i in range(count)]


def _whole(value: float) -> int | None:
    return None if value != value else int(value)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def common_columns(
    bench: Bench, cell: Cell, batch: int, found: Submissions, images: Tensor, examples: Sequence[Example]
) -> list[Row]:
    """What clean and attacked rows share."""
    known, contender = bench.tasks[cell.task], bench.contenders[cell.defense]
    clean = clean_images(examples)
    scored = score_all(bench, cell.task, found.answers, examples)
    restored = psnr(found.purified, clean).tolist()
    purifier = contender.defense.purifier
    doubted = [None] * len(examples) if purifier is None else _doubts(purifier, images, found).tolist()
    return [
        {
            **_place_columns(bench, cell, batch, example, clean[i]),
            "answer": found.answers[0][i],
            "answers": [turn[i] for turn in found.answers] if len(found.answers) > 1 else None,
            "resubmissions": len(found.answers),
            "headline": known.task.headline,
            **scored[i],
            "randomized": contender.randomized,
            "purified_psnr": restored[i],  # of what the victim saw, against the clean picture
            "suspicion": doubted[i],  # the purifier's detection score before the sigmoid, or levels removed
            "judge_seed": found.seed,
            "purify_seconds": found.purify_seconds,
            "generate_seconds": found.generate_seconds,
        }
        for i, example in enumerate(examples)
    ]


@torch.no_grad()
def _doubts(purifier: Purifier, images: Tensor, found: Submissions) -> Tensor:
    """`suspicion` at the first submission, ``[B]``; of what the network made, before gate and guidance, as it drew."""
    inner = unwrapped(purifier)
    if not getattr(inner, "gate", False) and getattr(inner, "guidance", None) is None:
        return suspicion(purifier, images, found.purified)
    draw = torch.Generator().manual_seed(found.seed)
    transformed = inner.transformed(images.to(default_device()), generator=draw).to(images.device)
    return suspicion(purifier, images, transformed)


def _place_columns(bench: Bench, cell: Cell, batch: int, example: Example, clean: Tensor) -> Row:
    """Which figure the row belongs to, and what was asked about which picture."""
    eps, norm = bench.config.radius(cell.eps), bench.config.norm
    return {
        "key": row_key(cell, eps_label(eps, norm), example.id),
        "task": cell.task,
        "defense": cell.defense,
        "threat": cell.threat,
        "attack": cell.attack,
        "eps": eps,
        "norm": norm,
        "example": example.id,
        "image": _fingerprint(clean),
        "batch": batch,
        "victim": bench.victim.name,
        "crafted_on": bench.crafter.name,
        "kind": example.kind,
        "prompt": example.prompt,
        "references": list(example.references),
    }


def clean_rows(bench: Bench, folder: Path, cell: Cell, batch: int, indices: Sequence[int]) -> list[Row]:
    """Rows of one batch that nobody attacked."""
    examples = bench.tasks[cell.task].examples(indices)
    images = clean_images(examples)
    found = submit(bench, cell, batch, images, examples)
    rows = common_columns(bench, cell, batch, found, images, examples)
    for i, row in enumerate(rows):
        row |= {"goal": CLEAN, "success": {}, "success_any": {}, "seconds": 0.0}
        row["pictures"] = _keep(bench, folder, cell, indices[i], {"clean": images[i], "purified": found.purified[i]})
    return rows


def attacked_rows(
    bench: Bench, folder: Path, cell: Cell, batch: int, indices: Sequence[int], crafted: Crafted, clean: list[Row]
) -> list[Row]:
    """Rows of one batch under attack. ``clean`` are the same defense's clean rows of the same examples."""
    examples = as_asked(bench.tasks[cell.task].examples(indices), crafted.notes)
    images, spec = crafted.images, bench.attacks[cell.attack].spec
    found = submit(bench, cell, batch, images, examples)
    rows = common_columns(bench, cell, batch, found, images, examples)
    success = successes(bench, cell, found, examples, clean)
    defended = defended_objective(bench, cell, batch, examples, images, crafted.notes)
    for i, (row, note) in enumerate(zip(rows, crafted.notes, strict=True)):
        row |= note
        row |= {
            "goal": spec.goal,
            "access": spec.threat,
            "target": bench.tasks[cell.task].task.target if spec.goal in NEEDS_SENTENCE else None,
            "clean_answer": clean[i]["answer"],
            "clean_scores": clean[i]["scores"],
            "success": success["success"][i],
            "success_any": success["success_any"][i],
            "objective": {**note.get("objective", {}), "defended": defended[i]},
            "gradient_kind": _gradient_kind(bench, cell, spec.threat),
        }
        shown = {"attacked": images[i], "purified": found.purified[i]}
        row["pictures"] = _keep(bench, folder, cell, indices[i], shown)
    return rows


def defended_objective(
    bench: Bench, cell: Cell, batch: int, examples: Sequence[Example], images: Tensor, notes: Sequence[Row]
) -> list[float | None]:
    """The attack's objective on the finished images, seen through the judged defense; None where that is elsewhere."""
    if bench.config.craft_victim:
        return [None] * len(examples)
    if cell.defense == BARE:
        return [_number(note["objective"]["bare"]) for note in notes]
    generator = make_generator(bench.config.seed, "objective", *cell, batch)
    victim = DefendedVictim(bench.victim, judged_defense(bench, cell, batch), generator=generator)
    return [*evaluate_objective(make_objective(bench, cell, victim, examples, clean_images(examples)), images)]


def _gradient_kind(bench: Bench, cell: Cell, access: str) -> str:
    if access != "white-box":
        return "none"
    source = origin(bench, cell)
    if source.threat == "T0":
        return "exact"
    through = bench.surrogate if source.threat == "T1" else bench.contenders[source.defense]
    return "exact" if through is None or through.gradient == "none needed" else through.gradient


def _keep(bench: Bench, folder: Path, cell: Cell, index: int, shown: dict[str, Tensor]) -> Row | None:
    """Write the pictures of the first examples as PNG; their paths inside the run folder."""
    if index >= bench.config.panels:
        return None
    names = {}
    for name, image in shown.items():
        path = Path("panels") / place(bench, cell) / f"{index}-{name}.png"
        pictures.save(folder / path, image)
        names[name] = path.as_posix()
    return names


def _fingerprint(image: Tensor) -> str:
    """Which picture an example shows: questions on one picture share it."""
    return hashlib.sha256((image * 255).round().to(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:12]
