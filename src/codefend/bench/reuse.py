"""Attacked images of another run, reused where they were made with the same settings: a later defense costs no attack.

They are verified: the budget is measured again on this run's images, and the attack's objective is computed again with
this run's victim and defense, which reveals weights that changed under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from codefend.bench.attacking import clean_images, spent_budget, violations
from codefend.bench.config import EvalConfig
from codefend.bench.craft import (
    AttackedBatch,
    load_attacked,
    save_attacked,
    source_objective,
    source_victim,
    with_prompts,
)
from codefend.bench.results import Cell, attacked_path, source_cell
from codefend.bench.setup import Bench
from codefend.core.runs import Row, plain, read_config
from codefend.core.seeds import make_generator
from codefend.types import CodefendError, Example

SHARED = ("split", "norm", "seed", "batch", "target")  # must be the same in both configs
TOLERANCE = 1e-3  # relative, and absolute in the objective's unit: other threads add in another order


def check_donor(config: EvalConfig, run_dir: Path, donor: Path) -> None:
    """Raise CodefendError when ``donor`` is no run, this run itself, or a run with other settings."""
    if donor.resolve() == run_dir.resolve():
        raise CodefendError(f"attacked={donor} is this run's own folder; name another run, or leave it out")
    theirs, ours = read_config(donor), plain(config)
    for key in ("victim", *SHARED):
        there, here = (_crafter(c) if key == "victim" else c.get(key) or None for c in (theirs, ours))
        if there != here:
            raise CodefendError(
                f"attacked={donor} was made with {key}={there!r}, this run has {here!r}: "
                f"its images cannot be used; use the same {key}, or leave attacked out"
            )


def _crafter(config: Row) -> Any:
    """The victim whose gradients made the images."""
    return config.get("craft_victim") or config.get("victim")


def reuse_attacked(
    bench: Bench, folder: Path, donor: Path, cell: Cell, batch: int, examples: Sequence[Example], skip: Tensor
) -> None:
    """Copy one batch of attacked images from the run ``donor``, unless it has none or used another budget.

    ``skip`` as for `craft`. Raises CodefendError when the images can't be those of this run's own attack.
    """
    source = source_cell(bench.config, cell)
    own, theirs = (attacked_path(run, bench.config, source, batch) for run in (folder, donor))
    if own.exists() or not theirs.exists():
        return
    attacked = load_attacked(theirs)
    if not _same_settings(bench, source, batch, attacked.notes, skip):
        return
    problem = _problem(bench, source, batch, examples, attacked)
    if problem:
        raise CodefendError(f"{theirs} cannot be used here: {problem}; leave attacked out to make the images anew")
    save_attacked(own, AttackedBatch(attacked.images, [{**note, "reused": True} for note in attacked.notes]))


def _same_settings(bench: Bench, source: Cell, batch: int, notes: Sequence[Row], skip: Tensor) -> bool:
    """Whether the notes record the same skipped examples, the same budget, and the objective to compare with."""
    if [note["skipped"] for note in notes] != skip.tolist():
        return False
    choice = bench.attacks[source.attack]
    _, randomized = source_victim(bench, source, batch)
    budget = choice.budget(bench.config, source.eps, randomized=randomized)
    spent = spent_budget(choice.build(), budget)
    attacked = [note for note in notes if not note["skipped"]]
    return all(n["budget"] == spent and n["objective"].get("source") is not None for n in attacked)


def _problem(bench: Bench, source: Cell, batch: int, examples: Sequence[Example], attacked: AttackedBatch) -> str:
    """Evidence that the images belong to other examples, another attack or another model; "" if there is none."""
    clean, images, notes = clean_images(examples), attacked.images, attacked.notes
    if images.shape != clean.shape:
        return f"its images are {tuple(images.shape)}, this run's {tuple(clean.shape)}"
    seed = make_generator(bench.config.seed, "attack", *source, batch).initial_seed()
    if any(not note["skipped"] and note["seeds"]["attack"] != seed for note in notes):
        return "the attack drew from another seed"
    choice = bench.attacks[source.attack]
    budget = choice.budget(bench.config, source.eps, randomized=False)
    outside = [problem for problem in violations(images, images, clean, budget, choice.build()) if problem]
    if outside:
        return f"measured against this run's images, {outside[0]}"
    skipped = [i for i, note in enumerate(notes) if note["skipped"]]
    if not bool((images[skipped] == clean[skipped]).all()):
        return "a skipped image differs from this run's"
    return _other_objective(bench, source, batch, examples, attacked)


def _other_objective(
    bench: Bench, source: Cell, batch: int, examples: Sequence[Example], attacked: AttackedBatch
) -> str:
    rest = [i for i, note in enumerate(attacked.notes) if not note["skipped"]]
    if not rest:
        return ""
    reworded = with_prompts([examples[i] for i in rest], [attacked.notes[i]["asked"] for i in rest])
    now = source_objective(bench, source, batch, reworded, attacked.images[rest])
    for i, value in zip(rest, now, strict=True):
        then = float(attacked.notes[i]["objective"]["source"])
        if not math.isclose(value, then, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            return f"the objective was {then:.4f} there and is {value:.4f} here: another model, prompt or defense"
    return ""
