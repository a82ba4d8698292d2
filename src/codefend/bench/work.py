"""One batch of a cell: its rows, from attacked images to scores, and which of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from codefend.attacks import NEEDS_SENTENCE
from codefend.bench.cells import Cell, row_key
from codefend.bench.craft import craft
from codefend.bench.judge import attacked_rows, clean_rows
from codefend.bench.results import CLEAN, score
from codefend.bench.reuse import reuse_attacked
from codefend.bench.setup import Bench
from codefend.core.runs import Row, Run

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
