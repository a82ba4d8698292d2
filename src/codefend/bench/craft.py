"""Attacked images: made once per source, rounded as an upload would be, checked, and kept in the run folder.

The *source* is what the attack's objective goes through: the bare victim (T0), a surrogate defense (T1), or the judged
defense itself (T2, T2d). All defenses judged against one source see the very same 8-bit images.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from codefend.attacks import TextAttackSpec, asked_for, objective_for
from codefend.attacks.bounds import OwnBound, finished
from codefend.attacks.norms import distance
from codefend.attacks.search import Trace
from codefend.bench.adaptive import seen_through, unsuspected
from codefend.bench.results import BARE, eps_label
from codefend.bench.setup import Bench
from codefend.core.images import quantize8
from codefend.core.runs import Row, load_checkpoint, make_generator, save_checkpoint
from codefend.defense import DefendedVictim, Defense
from codefend.tasks.image_metrics import psnr
from codefend.types import Budget, CodefendError, Example, Objective, Purifier, Victim

SLACK = 1e-5  # float32 rounding of an attack's projection, pixel units
TAIL, LATE = 0.1, 0.05  # converged: the last tenth of the steps brought at most 5% of the gain


class Cell(NamedTuple):
    """One figure in the making. ``eps`` as in the config's list."""

    task: str
    attack: str
    eps: float
    threat: str
    defense: str


@dataclass(frozen=True)
class Crafted:
    """8-bit images ``[B, 3, H, W]`` in [0, 1] and one note per example on how they came about."""

    images: Tensor
    notes: list[Row]


@dataclass(frozen=True)
class Attempt:
    """What an attack left before rounding, and how it came to that."""

    attack: object
    budget: Budget
    raw: Tensor  # [B, 3, H, W]
    prompts: list[str]
    trace: Trace
    seconds: float  # an image
    seed: int


class KnownSeed:
    """A purifier that draws the same noise in every call: what an attacker knows who knows the seed (T2d)."""

    def __init__(self, purifier: Purifier, seed: int, *names: object) -> None:
        self.purifier, self.seed, self.names = purifier, seed, names

    def __call__(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.purifier(images, generator=make_generator(self.seed, *self.names))


def slug(text: object) -> str:
    """A file name for any label, another one for another label."""
    name = re.sub(r"[^A-Za-z0-9.=_-]+", "_", str(text)).strip(".")[:80]
    return name if name and name == str(text) else f"{name}-{hashlib.sha256(str(text).encode()).hexdigest()[:6]}"


def origin(bench: Bench, cell: Cell) -> Cell:
    """The cell with the defense that its attack goes through: what attacked images and their seeds depend on.

    A transfer from another victim without a surrogate defense uses what is an oblivious attack over there.
    """
    if bench.config.craft_victim and not bench.config.surrogate:
        return cell._replace(threat="T0", defense=BARE)
    return cell._replace(defense={"T0": BARE, "T1": bench.config.surrogate}.get(cell.threat, cell.defense))


def judge_names(cell: Cell, batch: int) -> tuple[object, ...]:
    """What the noise of the judged defense is derived from, beside the seed and the number of the submission."""
    return ("judge", *cell, batch)


def source_victim(bench: Bench, source: Cell, batch: int, use: str = "attack noise") -> tuple[Victim, bool]:
    """The victim whose objective the attack lowers, and whether it is randomized. ``use`` names its noise's stream."""
    victim = bench.crafter
    contender = bench.surrogate if source.threat == "T1" else bench.contenders.get(source.defense)
    if source.threat == "T0" or contender is None:
        return victim, False
    defense, seed = seen_through(bench, contender, bench.attacks[source.attack]), bench.config.seed
    if source.threat == "T2d" and defense.purifier is not None:
        known = KnownSeed(defense.purifier, seed, *judge_names(source, batch), 0)
        return DefendedVictim(victim, Defense(known, defense.policy, defense.name)), False
    generator = make_generator(seed, use, *source, batch)
    return DefendedVictim(victim, defense, generator=generator), contender.randomized


def craft(bench: Bench, folder: Path, cell: Cell, batch: int, examples: Sequence[Example], wrong: Tensor) -> Crafted:
    """The attacked images of one batch, from disk where they were made before.

    ``wrong`` ``[B]`` bool: examples to leave as they are, since nothing is left to break in them.
    """
    source = origin(bench, cell)
    path = attacked_path(bench, folder, source, batch)
    if path.exists():
        return read_attacked(path)
    return keep_attacked(path, _craft(bench, source, batch, examples, wrong))


def attacked_path(bench: Bench, folder: Path, source: Cell, batch: int) -> Path:
    """Where a run keeps the attacked images of one batch."""
    return folder / "attacked" / place(bench, source) / f"{batch:05d}.safetensors"


def read_attacked(path: Path) -> Crafted:
    """What ``keep_attacked`` wrote. Raises CodefendError when the file is damaged."""
    tensors, state = load_checkpoint(path)
    if "images" not in tensors or "notes" not in state:
        raise CodefendError(f"{path} holds no attacked images; remove it to make them again")
    return Crafted(tensors["images"].to(torch.float32) / 255, state["notes"])


def keep_attacked(path: Path, crafted: Crafted) -> Crafted:
    """Write attacked images as 8 bits, and return them as they will be read."""
    levels = (crafted.images * 255).round().clamp(0, 255).to(torch.uint8)
    save_checkpoint(path, {"images": levels}, {"notes": crafted.notes})
    return Crafted(levels.to(torch.float32) / 255, crafted.notes)


def place(bench: Bench, cell: Cell) -> Path:
    """The folder, inside a run's, of what belongs to one cell."""
    label = eps_label(bench.config.radius(cell.eps), bench.config.norm)
    parts = (cell.task, cell.attack, label, f"{cell.threat}-{cell.defense}")
    return Path(*(slug(part) for part in parts))


def clean_images(examples: Sequence[Example]) -> Tensor:
    """``[B, 3, H, W]`` as a user would upload them: 8 bits."""
    return quantize8(torch.stack([example.image for example in examples]))


def _craft(bench: Bench, source: Cell, batch: int, examples: Sequence[Example], wrong: Tensor) -> Crafted:
    clean = clean_images(examples)
    todo = [i for i in range(len(examples)) if not wrong[i]]
    images, notes = clean.clone(), [_skipped(clean[i]) for i in range(len(examples))]
    if todo:
        chosen = [examples[i] for i in todo]
        attacked, found = _attack(bench, source, batch, chosen, clean[todo])
        images[todo] = attacked
        for i, note in zip(todo, found, strict=True):
            notes[i] = note
    return Crafted(images, notes)


def _skipped(clean: Tensor) -> Row:
    return {"skipped": True, "perturbation": {"linf": 0.0, "l2": 0.0, "psnr": None}, "violation": "", "seconds": 0.0}


def _attack(
    bench: Bench, source: Cell, batch: int, examples: Sequence[Example], clean: Tensor
) -> tuple[Tensor, list[Row]]:
    """The finished images, each with its note: what the attack did, and what that did to its objective."""
    made = _attempt(bench, source, batch, examples, clean)
    examples = [replace(example, prompt=prompt) for example, prompt in zip(examples, made.prompts, strict=True)]
    attacked = finished(made.attack, made.raw.nan_to_num(0.5), clean, made.budget)
    bare = evaluate_objective(make_objective(bench, source, bench.crafter, examples, clean), attacked)
    seen = bare if source.threat == "T0" else source_objective(bench, source, batch, examples, clean, attacked)
    lowered = [{"bare": value, "source": through} for value, through in zip(bare, seen, strict=True)]
    return attacked, _notes(made, attacked, clean, lowered, bench.config.seed)


def _attempt(bench: Bench, source: Cell, batch: int, examples: Sequence[Example], clean: Tensor) -> Attempt:
    choice = bench.attacks[source.attack]
    victim, randomized = source_victim(bench, source, batch)
    budget = choice.budget(bench.config, source.eps, randomized=randomized)
    attack, trace = choice.build(bench.tasks[source.task].task.target), Trace()
    trace.attach(attack)
    generator = make_generator(bench.config.seed, "attack", *source, batch)
    start, prompts = time.perf_counter(), [example.prompt for example in examples]
    if isinstance(choice.spec, TextAttackSpec):
        asked = asked_for(choice.spec, victim, *_answers_and_target(bench, source, examples))
        raw, prompts = attack(asked, clean, prompts, budget, generator=generator)
    else:
        objective = make_objective(bench, source, victim, examples, clean)
        raw = attack(objective, clean, budget, generator=generator)
    seconds = (time.perf_counter() - start) / len(examples)
    return Attempt(attack, budget, raw.detach(), prompts, trace, seconds, generator.initial_seed())


def _notes(made: Attempt, attacked: Tensor, clean: Tensor, lowered: list[Row], seed: int) -> list[Row]:
    """How each image came about. ``lowered``: the objective on each finished image; ``seed`` is the config's."""
    columns = (
        made.prompts,
        perturbations(attacked, clean),
        violations(made.raw, attacked, clean, made.budget, made.attack),
        lowered,
        curves(made.trace.losses, len(clean)),
        gradients(made.trace, len(clean)),
    )
    spent = {"steps": made.budget.steps, "eot": made.budget.eot, "restarts": getattr(made.attack, "restarts", 1)}
    return [
        {
            "skipped": False,
            "asked": prompt,
            "perturbation": size,
            "violation": problem,
            "objective": value,
            "curve": curve,
            "gradient": slope,
            "seconds": made.seconds,
            "budget": dict(spent),
            "seeds": {"config": seed, "attack": made.seed},
        }
        for prompt, size, problem, value, curve, slope in zip(*columns, strict=True)
    ]


def source_objective(
    bench: Bench, source: Cell, batch: int, examples: Sequence[Example], clean: Tensor, attacked: Tensor
) -> list[float]:
    """The objective on the finished images through what was attacked, with noise of its own: the same in every run."""
    victim, _ = source_victim(bench, source, batch, "source objective")
    return evaluate_objective(make_objective(bench, source, victim, examples, clean), attacked)


def make_objective(bench: Bench, cell: Cell, victim: Victim, examples: Sequence[Example], clean: Tensor) -> Objective:
    """What the attack of ``cell`` lowers, seen through ``victim``."""
    choice, wanted = bench.attacks[cell.attack], None
    prompts = [example.prompt for example in examples]
    answers, target = _answers_and_target(bench, cell, examples)
    if isinstance(choice.spec, TextAttackSpec):
        return asked_for(choice.spec, victim, answers, target)(prompts)
    if choice.spec.goal == "feature-target":
        wanted = _other_images(bench, cell.task, examples, clean)
    objective = objective_for(choice.spec, victim, prompts, answers, target, clean, wanted)
    if choice.means.evade and isinstance(victim, DefendedVictim) and victim.defense.purifier is not None:
        objective = unsuspected(objective, victim.defense.purifier, clean, choice.means.evade, victim.generator)
    return objective


def _answers_and_target(bench: Bench, cell: Cell, examples: Sequence[Example]) -> tuple[list[str], str]:
    return [true_answer(example) for example in examples], bench.tasks[cell.task].task.target


def as_asked(examples: Sequence[Example], notes: Sequence[Row]) -> list[Example]:
    """The examples with the prompts that a text attack left them."""
    return [replace(e, prompt=note.get("asked", e.prompt)) for e, note in zip(examples, notes, strict=True)]


def true_answer(example: Example) -> str:
    """What most references say, the first of equals."""
    return max(example.references, key=example.references.count)


def _other_images(bench: Bench, task: str, examples: Sequence[Example], clean: Tensor) -> Tensor:
    """For each example the picture half the set away, at this batch's size."""
    known, others = bench.tasks[task], []
    for example in examples:
        other = (known.ids.index(example.id) + max(len(known.ids) // 2, 1)) % len(known.ids)
        others.append(F.interpolate(quantize8(known.task.examples[other].image)[None], clean.shape[-2:]))
    return torch.cat(others)


def evaluate_objective(objective: Objective, images: Tensor) -> list[float]:
    """The objective on finished images, one number each."""
    with torch.no_grad():
        return [float(value) for value in objective(images).tolist()]


def perturbations(attacked: Tensor, clean: Tensor) -> list[Row]:
    """How far each image was moved, in pixel units and dB."""
    linf, l2 = distance(attacked, clean, "linf").tolist(), distance(attacked, clean, "l2").tolist()
    return [{"linf": a, "l2": b, "psnr": c} for a, b, c in zip(linf, l2, psnr(attacked, clean).tolist(), strict=True)]


def violations(raw: Tensor, attacked: Tensor, clean: Tensor, budget: Budget, attack: object) -> list[str]:
    """What is wrong with each attacked image, "" if nothing: before rounding as the attack left it, and after.

    ``attack`` is asked where it has a bound of its own.
    """
    found = []
    for before, after, original in zip(raw, attacked, clean, strict=True):
        stages = [("the attack's image", before), ("the 8-bit image", after)]
        found.append("; ".join(p for name, image in stages if (p := _problem(name, image, original, budget, attack))))
    return found


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
    """Per example: the objective at the start, the best at the end, the share of the gain that came last."""
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
