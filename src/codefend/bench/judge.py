"""The rows of one batch: its images are made, submitted to the defended victim, and each answer is scored."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from codefend.attacks import NEEDS_SENTENCE
from codefend.bench.attacking import clean_images, evaluate_objective
from codefend.bench.craft import (
    AttackedBatch,
    adaptive_objective,
    attack_goal,
    craft,
    detection_score,
    transformed,
    with_known_seed,
    with_prompts,
)
from codefend.bench.results import BARE, CLEAN, Cell, cell_folder, noise_names, row_key, score, source_cell
from codefend.bench.reuse import reuse_attacked
from codefend.bench.setup import Bench
from codefend.bench.tasks import EvaluatedTask
from codefend.core.images import quantize8, save
from codefend.core.runs import Row, Run
from codefend.core.seeds import make_generator
from codefend.defense import DefendedVictim, Defense
from codefend.purifiers.base import Purifier, WrappedPurifier
from codefend.tasks.metrics import normalize_answer, psnr, targeted_success
from codefend.types import Example

CleanRows = dict[tuple[str, str, str], Row]  # by task, defense, example
Work = tuple[Cell, int, list[int]]  # one batch of a cell: its number and its examples


def fill(bench: Bench, run: Run, work: Work, clean: CleanRows, donor: Path | None) -> int:
    """Make the rows of one batch unless all are there; how many were added.

    A batch is made whole even where a kill left some of its rows: the others must not depend on that.
    """
    if is_complete(bench, run, work):
        return 0
    cell, _, indices = work
    ids = [] if cell.attack == CLEAN else [bench.tasks[cell.task].ids[i] for i in indices]
    rows = batch_rows(bench, run.dir, work, [clean[cell.task, cell.defense, name] for name in ids], donor)
    if cell.attack == CLEAN:
        clean |= {clean_key(row): row for row in rows}
    return sum(run.append(row) for row in rows)


def is_complete(bench: Bench, run: Run, work: Work) -> bool:
    """Whether the run has every row of a batch."""
    cell, _, indices = work
    names = bench.tasks[cell.task].ids
    return all(run.has(row_key(bench.config, cell, names[i])) for i in indices)


def batch_rows(bench: Bench, folder: Path, work: Work, before: list[Row], donor: Path | None) -> list[Row]:
    """The rows of one batch; images go into the run's ``folder``. ``before`` are its clean rows, for an attack."""
    cell, batch, indices = work
    if cell.attack == CLEAN:
        return clean_rows(bench, folder, cell, batch, indices)
    skip, examples = already_broken(bench, cell, before), bench.tasks[cell.task].examples(indices)
    if donor is not None:
        reuse_attacked(bench, folder, donor, cell, batch, examples, skip)
    attacked = craft(bench, folder, cell, batch, examples, skip)
    return attacked_rows(bench, folder, cell, batch, indices, attacked, before)


def clean_key(row: Row) -> tuple[str, str, str]:
    return row["task"], row["defense"], row["example"]


def already_broken(bench: Bench, cell: Cell, clean: Sequence[Row]) -> Tensor:
    """Examples that a white-box attack may leave out, ``[B]`` bool: nothing is left to break.

    Only through a deterministic defense, only untargeted, and only where the headline score is 0 already; never at T0,
    where other defenses are judged on the same images, nor at T1.
    """
    evaluated, defense = bench.tasks[cell.task], bench.defenses[cell.defense]
    allowed = bench.config.skip_wrong and cell.threat == "T2" and not defense.randomized
    if not allowed or bench.attacks[cell.attack].spec.goal in NEEDS_SENTENCE:
        return torch.zeros(len(clean), dtype=torch.bool)
    headline = [score(row, metric=evaluated.headline) for row in clean]
    right = [score(row, metric=evaluated.judge) for row in clean]
    return torch.tensor([a == 0 and b == 0 for a, b in zip(headline, right, strict=True)])


class RecordingPurifier(WrappedPurifier):
    """A purifier that keeps its outputs and the seconds it took; ``rounded`` returns them as 8-bit images."""

    def __init__(self, purifier: Purifier, *, rounded: bool = False) -> None:
        super().__init__(purifier)
        self.rounded, self.seconds = rounded, 0.0
        self.outputs: list[Tensor] = []

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        start = time.perf_counter()
        purified = self.purifier(images, generator=generator)
        self.seconds += time.perf_counter() - start
        self.outputs.append(purified)
        return quantize8(purified) if self.rounded else purified


@dataclass(frozen=True)
class Submissions:
    """N submissions of the same images: answers ``[N][B]``, N times ``[B, 3, H, W]`` purified, seconds per image."""

    answers: list[list[str]]
    purified: list[Tensor]  # what the victim gets
    detection: Sequence[float | None]  # `detection_score` at the first submission; None without a purifier
    purify_seconds: float
    generate_seconds: float
    seed: int


def clean_rows(bench: Bench, folder: Path, cell: Cell, batch: int, indices: Sequence[int]) -> list[Row]:
    """Rows of one batch without attack."""
    examples = bench.tasks[cell.task].examples(indices)
    images = clean_images(examples)
    submissions = submit(bench, cell, batch, images, examples)
    rows = common_columns(bench, cell, batch, submissions, examples)
    for i, row in enumerate(rows):
        row |= {"goal": CLEAN, "success": {}, "success_any": {}, "seconds": 0.0}
        panel = {"clean": images[i], "purified": submissions.purified[0][i]}
        row["pictures"] = _save_panel(bench, folder, cell, indices[i], panel)
    return rows


def attacked_rows(
    bench: Bench,
    folder: Path,
    cell: Cell,
    batch: int,
    indices: Sequence[int],
    attacked: AttackedBatch,
    clean: list[Row],
) -> list[Row]:
    """Rows of one batch under attack. ``clean`` are the same defense's clean rows of the same examples."""
    images, notes = attacked.images, attacked.notes
    examples = bench.tasks[cell.task].examples(indices)
    examples = with_prompts(examples, [note.get("asked", e.prompt) for note, e in zip(notes, examples, strict=True)])
    submissions = submit(bench, cell, batch, images, examples)
    rows = common_columns(bench, cell, batch, submissions, examples)
    successes = success_columns(bench, cell, submissions, examples, clean)
    objectives = defended_objective(bench, cell, batch, examples, attacked)
    attack = _attack_columns(bench, cell)
    for i, (row, note) in enumerate(zip(rows, notes, strict=True)):
        row |= note | attack | successes[i]
        row |= {"clean_answer": clean[i]["answer"], "clean_scores": clean[i]["scores"]}
        row["objective"] = {**note.get("objective", {}), "defended": objectives[i]}
        panel = {"attacked": images[i], "purified": submissions.purified[0][i]}
        row["pictures"] = _save_panel(bench, folder, cell, indices[i], panel)
    return rows


def submit(bench: Bench, cell: Cell, batch: int, images: Tensor, examples: Sequence[Example]) -> Submissions:
    """Submit ``images`` to the defended victim: N times if it is randomized, with fresh noise each time."""
    evaluated, randomized = bench.tasks[cell.task], bench.defenses[cell.defense].randomized
    times = bench.config.resubmissions if randomized and cell.threat != "T2d" else 1
    names, prompts = noise_names(cell, batch), [example.prompt for example in examples]
    defense, recorder = judged_defense(bench, cell, batch), None
    if defense.purifier is not None:
        recorder = RecordingPurifier(defense.purifier, rounded=evaluated.by_agreement)
        defense = replace(defense, purifier=recorder)
    draws = [make_generator(bench.config.seed, *names, turn) for turn in range(times)]
    seed, start = draws[0].initial_seed(), time.perf_counter()
    answers = [DefendedVictim(evaluated.victim, defense, generator=d).generate(images, prompts) for d in draws]
    total, purify = time.perf_counter() - start, 0.0 if recorder is None else recorder.seconds
    count, purified, detection = len(images) * times, [images], [None] * len(images)
    if recorder is not None:
        outputs = [output.to(images.device) for output in recorder.outputs[:: defense.votes]]  # the first of each vote
        detection = first_detection(recorder.purifier, images, outputs[0], seed).tolist()
        purified = [quantize8(output) for output in outputs] if recorder.rounded else outputs
    return Submissions(answers, purified, detection, purify / count, (total - purify) / count, seed)


def judged_defense(bench: Bench, cell: Cell, batch: int) -> Defense:
    """The defense that answers in ``cell``; at T2d with the noise that the attacker knows."""
    defense = bench.defenses[cell.defense].defense
    return with_known_seed(bench, cell, batch, defense) if cell.threat == "T2d" else defense


def common_columns(
    bench: Bench, cell: Cell, batch: int, submissions: Submissions, examples: Sequence[Example]
) -> list[Row]:
    """The columns that clean and attacked rows share."""
    clean, evaluated, config = clean_images(examples), bench.tasks[cell.task], bench.config
    scores = score_columns(evaluated, submissions, examples)
    restored = psnr(submissions.purified[0], clean).tolist()
    return [
        {
            "key": row_key(config, cell, example.id),
            "task": cell.task,
            "defense": cell.defense,
            "threat": cell.threat,
            "attack": cell.attack,
            "eps": config.radius(cell.eps),
            "norm": config.norm,
            "example": example.id,
            "image": example.source or _fingerprint(clean[i]),
            "batch": batch,
            "victim": evaluated.victim.name,
            "crafted_on": evaluated.crafter.name,
            "kind": example.kind,
            "prompt": example.prompt,
            "references": list(example.references),
            "answer": submissions.answers[0][i],
            "answers": [turn[i] for turn in submissions.answers] if len(submissions.answers) > 1 else None,
            "resubmissions": len(submissions.answers),
            "headline": evaluated.headline,
            **scores[i],
            "randomized": bench.defenses[cell.defense].randomized,
            "purified_psnr": restored[i],  # of the victim's input against the clean image
            "suspicion": submissions.detection[i],
            "judge_seed": submissions.seed,
            "purify_seconds": submissions.purify_seconds,
            "generate_seconds": submissions.generate_seconds,
        }
        for i, example in enumerate(examples)
    ]


def score_columns(evaluated: EvaluatedTask, submissions: Submissions, examples: Sequence[Example]) -> list[Row]:
    """Per example: scores of the first answer, and over N answers their mean, their lowest, and of the majority's."""
    turns = [
        evaluated.score(answers, examples) | evaluated.score_images(images, examples)
        for answers, images in zip(submissions.answers, submissions.purified, strict=True)
    ]
    votes = turns[0]  # metrics of images have no majority
    if len(turns) > 1:
        votes = votes | evaluated.score(_majority(submissions.answers), examples)
    stacked = {name: torch.stack([turn[name] for turn in turns]).double() for name in turns[0]}
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
    majority = []
    for turns in zip(*answers, strict=True):
        counts = Counter(normalize_answer(answer) for answer in turns)
        top = max(counts.values())
        majority.append(next(answer for answer in turns if counts[normalize_answer(answer)] == top))
    return majority


def success_columns(
    bench: Bench, cell: Cell, submissions: Submissions, examples: Sequence[Example], clean: list[Row]
) -> list[Row]:
    """Per example ``success`` (of the first submission) and ``success_any`` (of any): 1, 0 or None, by kind."""
    evaluated, goal = bench.tasks[cell.task], bench.attacks[cell.attack].spec.goal
    before = torch.tensor([_number(row["scores"][evaluated.judge]) for row in clean])
    metric = evaluated.metrics[evaluated.judge]
    turns = [evaluated.untargeted_success(before, metric(t, examples).to(before)) for t in submissions.answers]
    kinds = {"untargeted": torch.stack(turns)}
    if goal in NEEDS_SENTENCE:
        reached = targeted_success(evaluated.task.target, [row["answer"] for row in clean])
        kinds["targeted"] = torch.stack([reached(turn, examples) for turn in submissions.answers])
    return [
        {
            "success": {kind: _flag(values[0, i]) for kind, values in kinds.items()},
            "success_any": {kind: _flag(values[:, i].amax()) for kind, values in kinds.items()},
        }
        for i in range(len(examples))
    ]


def _flag(value: Tensor) -> int | None:
    return None if value.isnan() else int(value)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


@torch.no_grad()
def first_detection(purifier: Purifier, images: Tensor, purified: Tensor, seed: int) -> Tensor:
    """`detection_score` ``[B]`` of the purifier's output before gate and guidance, drawn from ``seed`` once more."""
    if purifier.gate or purifier.guidance is not None:
        purified = transformed(purifier, images, torch.Generator().manual_seed(seed))
    return detection_score(purifier, images, purified)


def defended_objective(
    bench: Bench, cell: Cell, batch: int, examples: Sequence[Example], attacked: AttackedBatch
) -> Sequence[float | None]:
    """The attack's objective on the finished images through the judged defense; None for images of another victim."""
    if bench.config.craft_victim:
        return [None] * len(examples)
    if cell.defense == BARE:
        return [_number(note["objective"]["bare"]) for note in attacked.notes]
    generator = make_generator(bench.config.seed, "objective", *cell, batch)
    defense = judged_defense(bench, cell, batch)
    victim = DefendedVictim(bench.tasks[cell.task].victim, defense, generator=generator)
    goal = attack_goal(bench, cell, examples)
    return evaluate_objective(adaptive_objective(bench, goal, cell, victim), attacked.images)


def _attack_columns(bench: Bench, cell: Cell) -> Row:
    """What all rows of one attack share."""
    spec = bench.attacks[cell.attack].spec
    return {
        "goal": spec.goal,
        "access": spec.threat,
        "target": bench.tasks[cell.task].task.target if spec.goal in NEEDS_SENTENCE else None,
        "gradient_kind": _gradient_kind(bench, cell) if spec.threat == "white-box" else "none",
    }


def _gradient_kind(bench: Bench, cell: Cell) -> str:
    source = source_cell(bench.config, cell)
    if source.threat == "T0":
        return "exact"
    through = bench.surrogate if source.threat == "T1" else bench.defenses[source.defense]
    return "exact" if through is None or through.gradient == "none needed" else through.gradient


def _save_panel(bench: Bench, folder: Path, cell: Cell, index: int, images: dict[str, Tensor]) -> Row | None:
    """Write the images of the first examples as PNG; their paths inside the run folder."""
    if index >= bench.config.panels:
        return None
    names = {}
    for name, image in images.items():
        path = Path("panels") / cell_folder(bench.config, cell) / f"{index}-{name}.png"
        save(folder / path, image)
        names[name] = path.as_posix()
    return names


def _fingerprint(image: Tensor) -> str:
    """Identifies the image of an example: several questions may share it."""
    return hashlib.sha256((image * 255).round().to(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:12]
