"""The grid, cell by cell and batch by batch: whatever is on disk is skipped, so the same command resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from codefend.attacks import NEEDS_SENTENCE
from codefend.bench.adaptive import makes_sense
from codefend.bench.config import AttackChoice, EvalConfig, Means, check
from codefend.bench.craft import Cell, craft
from codefend.bench.frozen import check_unchanged
from codefend.bench.judge import attacked_rows, clean_rows, row_key
from codefend.bench.results import BARE, CLEAN, eps_label, score
from codefend.bench.reuse import check_donor, take_over
from codefend.bench.setup import Bench, Loaders, open_bench
from codefend.core.runs import Row, Run, check_run, open_run, progress

CleanRows = dict[tuple[str, str, str], Row]  # by task, defense, example


def cells(config: EvalConfig) -> Iterator[Cell]:
    """All cells in order, clean ones first, since every attacked row refers to a clean one."""
    for task in config.tasks:
        for defense in config.defenses:
            yield Cell(task, CLEAN, 0.0, "clean", defense)
    for task in config.tasks:
        for attack in config.attacks:
            for eps in _radii(config, attack):
                for threat in _threats(config):
                    for defense in config.defenses:
                        if _makes_sense(config, threat, defense) and _looks_through(config, threat, attack):
                            yield Cell(task, attack, eps, threat, defense)


def _radii(config: EvalConfig, attack: str) -> tuple[float, ...]:
    """The sizes to try: one, called 0, for an attack with a bound of its own."""
    return config.eps if AttackChoice.parse(attack, config).spec.bound == "ball" else (0.0,)


def _threats(config: EvalConfig) -> list[str]:
    """T0 comes first, and comes along whenever there are undefended rows; what another victim's images do is T1."""
    if config.craft_victim:
        return ["T1"]
    bare = ["T0"] if BARE in config.defenses else []
    return list(dict.fromkeys([*bare, *sorted(config.threats)]))


def _makes_sense(config: EvalConfig, threat: str, defense: str) -> bool:
    if config.craft_victim:
        return True
    if defense == BARE:
        return threat == "T0"
    if threat == "T1" and defense == config.surrogate:  # that is T2
        return False
    wanted = not config.adaptive or defense in config.adaptive
    return threat in config.threats and (wanted or threat in ("T0", "T1"))


def _looks_through(config: EvalConfig, threat: str, attack: str) -> bool:
    """Means to look through a defense change nothing for who doesn't see it."""
    return threat in ("T2", "T2d") or AttackChoice.parse(attack, config).means == Means()


def batches(bench: Bench, cell: Cell) -> list[list[int]]:
    """Example indices of a cell's batches, in order."""
    config = bench.config
    limit = config.adaptive_limit if cell.threat in ("T2", "T2d") else None
    return bench.tasks[cell.task].batches(config.batch, limit)


def run_grid(
    config: EvalConfig, run_dir: str | Path, loaders: Loaders | None = None, *, donor: Path | None = None
) -> list[Row]:
    """Fill the run folder with every row that it lacks and return them all; see ``evaluate``.

    ``donor`` is another run whose attacked images may be taken over, ``config.attacked`` by default.
    """
    check(config)
    donor = donor or (Path(config.attacked) if config.attacked else None)
    if donor is not None:
        check_donor(config, Path(run_dir), donor)
    check_run(run_dir, config)
    bench = open_bench(config, loaders)
    work = [cell for cell in cells(config) if _possible(bench, cell)]
    total = sum(len(batch) for cell in work for batch in batches(bench, cell))
    with open_run(run_dir, config) as run:
        _describe(bench, run, total)
        rows = run.rows()
        clean: CleanRows = {_place(row): row for row in rows if row["attack"] == CLEAN}
        with progress("evaluate", total, done=len(rows)) as advance:
            for cell in work:
                for number, indices in enumerate(batches(bench, cell)):
                    advance(_fill(bench, run, cell, number, indices, clean, donor), f"{cell.defense} {cell.attack}")
        return run.rows()


def _describe(bench: Bench, run: Run, total: int) -> None:
    """Write ``bench.json``, once: costs are measured once. Raises CodefendError for weights or policies that changed."""
    path = run.dir / "bench.json"
    if not path.exists():
        run.write("bench.json", json.dumps({**bench.describe(), "rows": total}, indent=2) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    check_unchanged(run.dir, before.get("prompts", {}), bench.prompts(), what="prompt policy")
    check_unchanged(run.dir, before.get("weights", {}), bench.weights())


def _possible(bench: Bench, cell: Cell) -> bool:
    """Whoever knows the seed of a defense without randomness knows nothing new; nor do means that change nothing."""
    if cell.attack != CLEAN and not makes_sense(bench, cell.defense, bench.attacks[cell.attack]):
        return False
    return cell.threat != "T2d" or bench.contenders[cell.defense].randomized


def _place(row: Row) -> tuple[str, str, str]:
    return row["task"], row["defense"], row["example"]


def _fill(
    bench: Bench, run: Run, cell: Cell, number: int, indices: Sequence[int], clean: CleanRows, donor: Path | None
) -> int:
    """Make the rows of one batch unless all are there; how many were added.

    A batch is made whole even where a kill left some of its rows: the others must not depend on that.
    """
    known = bench.tasks[cell.task]
    ids = [known.ids[i] for i in indices]
    label = eps_label(bench.config.radius(cell.eps), bench.config.norm)
    if all(run.has(row_key(cell, label, name)) for name in ids):
        return 0
    if cell.attack == CLEAN:
        rows = clean_rows(bench, run.dir, cell, number, indices)
        clean |= {_place(row): row for row in rows}
    else:
        before = [clean[cell.task, cell.defense, name] for name in ids]
        wrong, examples = hopeless(bench, cell, before), known.examples(indices)
        if donor is not None:
            take_over(bench, run.dir, donor, cell, number, examples, wrong)
        crafted = craft(bench, run.dir, cell, number, examples, wrong)
        rows = attacked_rows(bench, run.dir, cell, number, indices, crafted, before)
    return sum(run.append(row) for row in rows)


def hopeless(bench: Bench, cell: Cell, clean: Sequence[Row]) -> Tensor:
    """Examples that a white-box attack may leave out, ``[B]`` bool: nothing is left to break.

    Only through a defense without randomness, only untargeted, and only where the headline score is 0 already; never
    at T0, where others are judged on the same images, nor at T1.
    """
    known, contender = bench.tasks[cell.task], bench.contenders[cell.defense]
    allowed = bench.config.skip_wrong and cell.threat == "T2" and not contender.randomized
    if not allowed or bench.attacks[cell.attack].spec.goal in NEEDS_SENTENCE:
        return torch.zeros(len(clean), dtype=torch.bool)
    headline = [score(row, metric=known.task.headline) for row in clean]
    right = [score(row, metric=known.judge) for row in clean]
    return torch.tensor([a == 0 and b == 0 for a, b in zip(headline, right, strict=True)])
