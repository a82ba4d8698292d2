"""Attacked images of the grid: made once per source, rounded as an upload is, checked, and stored in the run folder.

The *source* is what the attack's objective goes through: the bare victim (T0), a surrogate defense (T1), or the judged
defense itself (T2, T2d). All defenses judged against one source get the same 8-bit images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from codefend.attacks import AttackSpec
from codefend.attacks.objectives import evading
from codefend.bench.attacking import (
    AttackGoal,
    attack_batch,
    attack_notes,
    clean_images,
    evaluate_objective,
    other_images,
    skipped_note,
)
from codefend.bench.config import AdaptiveOptions
from codefend.bench.results import Cell, attacked_path, noise_names, source_cell
from codefend.bench.setup import Bench, EvaluatedDefense
from codefend.core.checkpoints import load_checkpoint, save_checkpoint
from codefend.core.devices import default_device
from codefend.core.runs import Row
from codefend.core.seeds import make_generator
from codefend.defense import DefendedVictim, Defense, StraightThrough
from codefend.purifiers.base import Purifier, WrappedPurifier
from codefend.types import CodefendError, Example, Objective, Victim


@dataclass(frozen=True)
class AttackedBatch:
    """8-bit images ``[B, 3, H, W]`` in [0, 1] and one note per example on how they came about."""

    images: Tensor
    notes: list[Row]


class KnownSeedPurifier(WrappedPurifier):
    """A purifier that draws the same noise in every call, which an attacker at T2d knows."""

    def __init__(self, purifier: Purifier, seed: int, *names: object) -> None:
        super().__init__(purifier)
        self.stochastic, self.seed, self.names = False, seed, names

    def forward(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.purifier(images, generator=make_generator(self.seed, *self.names))

    def transformed(self, images: Tensor, *, generator: Generator | None = None) -> Tensor:
        return self.purifier.transformed(images, generator=make_generator(self.seed, *self.names))


def craft(
    bench: Bench, folder: Path, cell: Cell, batch: int, examples: Sequence[Example], skip: Tensor
) -> AttackedBatch:
    """The attacked images of one batch, from the run folder if they are there.

    ``skip`` ``[B]`` bool: examples to leave clean, see `judge.already_broken`.
    """
    source = source_cell(bench.config, cell)
    path = attacked_path(folder, bench.config, source, batch)
    if path.exists():
        return load_attacked(path)
    images, rest = clean_images(examples), (~skip).nonzero().flatten().tolist()
    notes = [skipped_note() for _ in examples]
    if rest:
        images[rest], made = attack_examples(bench, source, batch, [examples[i] for i in rest])
        for i, note in zip(rest, made, strict=True):
            notes[i] = note
    return save_attacked(path, AttackedBatch(images, notes))


def attack_examples(bench: Bench, source: Cell, batch: int, examples: Sequence[Example]) -> tuple[Tensor, list[Row]]:
    """Attacked images and their notes: how the attack went, and the objective that it reached."""
    choice, evaluated, seed = bench.attacks[source.attack], bench.tasks[source.task], bench.config.seed
    victim, randomized = source_victim(bench, source, batch)
    goal = attack_goal(bench, source, examples)
    attack = choice.build(evaluated.task.target)
    budget = choice.budget(bench.config, source.eps, randomized=randomized)
    generator = make_generator(seed, "attack", *source, batch)
    objective = adaptive_objective(bench, goal, source, victim)
    result = attack_batch(attack, goal, victim, budget, generator=generator, objective=objective)
    reworded = with_prompts(examples, result.prompts)
    bare = evaluate_objective(attack_goal(bench, source, reworded).objective(evaluated.crafter), result.images)
    through = bare if source.threat == "T0" else source_objective(bench, source, batch, reworded, result.images)
    notes = attack_notes(attack, result, goal.clean, budget)
    for note, at_bare, at_source in zip(notes, bare, through, strict=True):
        note["objective"] = {"bare": at_bare, "source": at_source}
        note["seeds"] = {"config": seed, "attack": generator.initial_seed()}
    return result.images, notes


def source_victim(bench: Bench, source: Cell, batch: int, use: str = "attack noise") -> tuple[Victim, bool]:
    """The victim whose objective the attack lowers, and whether it is randomized. ``use`` names its random stream."""
    victim = bench.tasks[source.task].crafter
    evaluated = bench.surrogate if source.threat == "T1" else bench.defenses.get(source.defense)
    if source.threat == "T0" or evaluated is None:
        return victim, False
    defense = attacked_defense(bench, evaluated, bench.attacks[source.attack].adaptive)
    if source.threat == "T2d" and defense.purifier is not None:
        return DefendedVictim(victim, with_known_seed(bench, source, batch, defense)), False
    generator = make_generator(bench.config.seed, use, *source, batch)
    return DefendedVictim(victim, defense, generator=generator), evaluated.randomized


def with_known_seed(bench: Bench, cell: Cell, batch: int, defense: Defense) -> Defense:
    """The defense with the noise of the first submission in every call (T2d)."""
    if defense.purifier is None:
        return defense
    known = KnownSeedPurifier(defense.purifier, bench.config.seed, *noise_names(cell, batch), 0)
    return Defense(known, defense.policy, defense.name)


def attack_goal(bench: Bench, cell: Cell, examples: Sequence[Example]) -> AttackGoal:
    """What the attack of ``cell`` wants on these examples."""
    spec, clean = bench.attacks[cell.attack].spec, clean_images(examples)
    evaluated, others = bench.tasks[cell.task], None
    if spec.goal == "feature-target":
        others = other_images(evaluated.task.examples, [evaluated.ids.index(e.id) for e in examples], clean)
    # The undefended victim's features where it is judged by them, and its words, which are cross-entropy's labels.
    reference = evaluated.crafter if evaluated.by_agreement or spec.goal == "feature-words" else None
    return AttackGoal(spec, examples, clean, evaluated.task.target, others, reference)


def adaptive_objective(bench: Bench, goal: AttackGoal, cell: Cell, victim: Victim) -> Objective:
    """``goal``'s objective through ``victim``, with the penalty of an attack that evades the detector."""
    objective, weight = goal.objective(victim), bench.attacks[cell.attack].adaptive.evade
    evading = weight > 0 and isinstance(goal.spec, AttackSpec)
    if evading and isinstance(victim, DefendedVictim) and victim.defense.purifier is not None:
        return evasive_objective(objective, victim.defense.purifier, goal.clean, weight, victim.generator)
    return objective


def source_objective(
    bench: Bench, source: Cell, batch: int, examples: Sequence[Example], attacked: Tensor
) -> list[float]:
    """The objective on the finished images through what was attacked, with noise of its own: the same in every run."""
    victim, _ = source_victim(bench, source, batch, "source objective")
    goal = attack_goal(bench, source, examples)
    return evaluate_objective(adaptive_objective(bench, goal, source, victim), attacked)


def with_prompts(examples: Sequence[Example], prompts: Sequence[str]) -> list[Example]:
    """The examples with the prompts that an attack on words left."""
    return [replace(example, prompt=prompt) for example, prompt in zip(examples, prompts, strict=True)]


def load_attacked(path: Path) -> AttackedBatch:
    """What `save_attacked` wrote. Raises CodefendError when the file is damaged."""
    tensors, state = load_checkpoint(path)
    if "images" not in tensors or "notes" not in state:
        raise CodefendError(f"{path} holds no attacked images; remove it to make them again")
    return AttackedBatch(tensors["images"].to(torch.float32) / 255, state["notes"])


def save_attacked(path: Path, attacked: AttackedBatch) -> AttackedBatch:
    """Write attacked images as 8 bits, and return them as they will be loaded."""
    levels = (attacked.images * 255).round().clamp(0, 255).to(torch.uint8)
    save_checkpoint(path, {"images": levels}, {"notes": attacked.notes})
    return AttackedBatch(levels.to(torch.float32) / 255, attacked.notes)


# --- adaptive attacks -------------------------------------------------------------------------------------------------


def attacked_defense(bench: Bench, evaluated: EvaluatedDefense, options: AdaptiveOptions) -> Defense:
    """The defense as an attack with these options differentiates it."""
    defense = evaluated.differentiable
    if options.process:
        defense = replace(defense, purifier=bench.shorter[evaluated.label, options.process])
    if options.bpda and defense.purifier is not None and evaluated.gradient == "exact":
        defense = replace(defense, purifier=StraightThrough(defense.purifier))
    return defense


def options_apply(bench: Bench, evaluated: EvaluatedDefense, options: AdaptiveOptions) -> bool:
    """Whether the options change the attack on this defense."""
    if evaluated.defense.purifier is None:
        return options == AdaptiveOptions()
    if options.process and (evaluated.label, options.process) not in bench.shorter:
        return False
    return not options.bpda or evaluated.gradient == "exact"


def detection_score(purifier: Purifier, images: Tensor, purified: Tensor) -> Tensor:
    """How suspicious ``purifier`` finds each image, ``[B]``, in units whose gradient doesn't fade.

    The logit of a calibrated detector, else the root mean square of the removed part in 8-bit levels. ``purified`` is
    `Purifier.transformed` of the images: before guidance and gate.
    """
    if purifier.detector is not None:
        return purifier.detector.logit(images, purified)
    return 255 * ((images - purified).square().flatten(1).mean(1) + 1e-12).sqrt()


def transformed(purifier: Purifier, images: Tensor, generator: Generator | None) -> Tensor:
    """`Purifier.transformed` on the default device, returned where the images lay."""
    return purifier.transformed(images.to(default_device()), generator=generator).to(images.device)


def evasive_objective(
    objective: Objective, purifier: Purifier, clean: Tensor, weight: float, generator: Generator | None
) -> Objective:
    """``objective`` with a penalty on detection scores above the detector's threshold, else above the clean image's.

    Each evaluation costs another purification. Carlini & Wagner 2017 (arXiv 1705.07263): attacks that aim at a detector
    evade it.
    """

    def score(images: Tensor) -> Tensor:
        purified = transformed(purifier, images, generator)
        # An identity gradient of the purifier would cancel the residual's own: there would be nothing to descend.
        return detection_score(purifier, images, purified.detach() if purifier.surrogate else purified)

    if purifier.detector is not None:
        return evading(objective, score, purifier.detector.limit, weight=weight)
    with torch.no_grad():
        limit = score(clean)
    return evading(objective, score, limit, weight=weight)
