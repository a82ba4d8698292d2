"""Attacked images of another run, taken over where they were made alike, so that a defense added later costs no attack.

Nothing is taken on trust: the budget is measured again on this run's pictures, and the attack's objective is computed
again with this run's victim and defense. Weights that changed under the same name would show there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from codefend.bench.config import EvalConfig
from codefend.bench.craft import (
    Cell,
    Crafted,
    as_asked,
    attacked_path,
    clean_images,
    keep_attacked,
    origin,
    read_attacked,
    source_objective,
    source_victim,
    violations,
)
from codefend.bench.setup import Bench
from codefend.core.runs import Row, make_generator, plain, read_config
from codefend.types import CodefendError, Example

SHARED = ("split", "norm", "seed", "batch", "target")  # must be the same in both configs
TOLERANCE = 1e-3  # relative, and absolute in the objective's unit: other threads add in another order


def check_donor(config: EvalConfig, run_dir: Path, donor: Path) -> None:
    """Raise CodefendError when ``donor`` is no run, this run itself, or a run of which nothing could be used."""
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


def take_over(
    bench: Bench, folder: Path, donor: Path, cell: Cell, batch: int, examples: Sequence[Example], wrong: Tensor
) -> None:
    """Copy one batch of attacked images from the run ``donor``, unless it has none or made them on another budget.

    ``wrong`` as for ``craft``. Raises CodefendError when the images aren't what this run's own attack could have made.
    """
    source = origin(bench, cell)
    own, theirs = (attacked_path(bench, place, source, batch) for place in (folder, donor))
    if own.exists() or not theirs.exists():
        return
    found = read_attacked(theirs)
    if not _made_alike(bench, source, batch, found, wrong):
        return
    problem = _problem(bench, source, batch, examples, found)
    if problem:
        raise CodefendError(f"{theirs} cannot be used here: {problem}; leave attacked out to make the images anew")
    keep_attacked(own, Crafted(found.images, [{**note, "reused": True} for note in found.notes]))


def _made_alike(bench: Bench, source: Cell, batch: int, found: Crafted, wrong: Tensor) -> bool:
    """Whether the notes say: as many examples, the same left out, the same budget, and how it looked to the victim."""
    if [note["skipped"] for note in found.notes] != wrong.tolist():
        return False
    choice = bench.attacks[source.attack]
    _, randomized = source_victim(bench, source, batch)
    budget = choice.budget(bench.config, source.eps, randomized=randomized)
    restarts = getattr(choice.build(), "restarts", 1)
    spent = {"steps": budget.steps, "eot": budget.eot, "restarts": restarts}
    return all(n["budget"] == spent and n["objective"].get("source") is not None for n in _attacked(found.notes))


def _attacked(notes: Sequence[Row]) -> list[Row]:
    return [note for note in notes if not note["skipped"]]


def _problem(bench: Bench, source: Cell, batch: int, examples: Sequence[Example], found: Crafted) -> str:
    """What tells that the images belong to other pictures, another attack or another model; "" when nothing does."""
    clean = clean_images(examples)
    if found.images.shape != clean.shape:
        return f"its pictures are {tuple(found.images.shape)}, this run's {tuple(clean.shape)}"
    seed = make_generator(bench.config.seed, "attack", *source, batch).initial_seed()
    if any(note["seeds"]["attack"] != seed for note in _attacked(found.notes)):
        return "the attack drew from another seed"
    choice = bench.attacks[source.attack]
    budget = choice.budget(bench.config, source.eps, randomized=False)
    problems = violations(found.images, found.images, clean, budget, choice.build())
    outside = [problem for problem in problems if problem]
    if outside:
        return f"measured against this run's pictures, {outside[0]}"
    return _other_model(bench, source, batch, examples, found, clean)


def _other_model(
    bench: Bench, source: Cell, batch: int, examples: Sequence[Example], found: Crafted, clean: Tensor
) -> str:
    todo = [i for i, note in enumerate(found.notes) if not note["skipped"]]
    left = [i for i, note in enumerate(found.notes) if note["skipped"]]
    if not bool((found.images[left] == clean[left]).all()):
        return "a picture that was left alone differs from this run's"
    if not todo:
        return ""
    chosen = as_asked([examples[i] for i in todo], [found.notes[i] for i in todo])
    now = source_objective(bench, source, batch, chosen, clean[todo], found.images[todo])
    for i, value in zip(todo, now, strict=True):
        then = float(found.notes[i]["objective"]["source"])
        if not math.isclose(value, then, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            return f"the objective was {then:.4f} there and is {value:.4f} here: another model, prompt or defense"
    return ""
