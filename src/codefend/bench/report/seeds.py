"""The report of one evaluation with several seeds: means over seeds and corrected paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from codefend.bench.report.table import Table, number, with_interval
from codefend.bench.results import eps_label
from codefend.bench.seeds import SeedMeans, seed_means
from codefend.core.files import write_atomic
from codefend.core.runs import Row, read_config, read_rows
from codefend.types import CodefendError

SCORE_NOTE = (
    "Worst case over attacks and resubmissions of each seed; an example's score is the mean over seeds. Brackets: 95% "
    "bootstrap interval over images. T0: oblivious, T2: adaptive white-box."
)


def read_seeds(folder: str | Path) -> list[Row]:
    """The rows of all seeds that have begun, each with its ``seed``. Raises CodefendError when there are none."""
    folder, rows = Path(folder), []
    for seed in read_config(folder)["seeds"]:
        path = folder / f"seed-{seed}"
        if (path / "rows.jsonl").exists():
            rows += [{**row, "seed": seed} for row in read_rows(path)]
    if not rows:
        raise CodefendError(f"{folder} has no results yet; rerun `codefend eval --run {folder}` to resume")
    return rows


def tables(rows: Sequence[Row], reference: str) -> list[Table]:
    """Scores, and differences of every defense from ``reference``."""
    figures, norm = seed_means(rows), str(rows[0]["norm"])
    return [_scores(figures, norm), _differences(figures, norm, reference)]


def _where(figure: SeedMeans, norm: str) -> tuple[str, ...]:
    group = figure.group
    return group.task, group.threat, eps_label(group.eps, norm), group.defense


def _scores(figures: Sequence[SeedMeans], norm: str) -> Table:
    lines = []
    for figure in figures:
        interval = figure.interval()
        width = number(interval.high - interval.low)
        lines.append((*_where(figure, norm), with_interval(interval), str(interval.n), str(figure.seeds), width))
    columns = ("task", "threat", "eps", "defense", "score [95% CI]", "n", "seeds", "width")
    return Table("Scores, mean over seeds", columns, tuple(lines), (SCORE_NOTE,), frozenset(columns[:4]))


def _differences(figures: Sequence[SeedMeans], norm: str, reference: str) -> Table:
    base = {figure.group._replace(defense=""): figure for figure in figures if figure.group.defense == reference}
    pairs = [(f, base[f.group._replace(defense="")]) for f in figures if f.group._replace(defense="") in base]
    pairs = [(figure, other) for figure, other in pairs if figure is not other]
    confidence = 1 - 0.05 / max(len(pairs), 1)
    lines = []
    for figure, other in pairs:
        gap = figure.less(other, confidence=confidence)
        verdict = "above" if gap.low > 0 else "below" if gap.high < 0 else "not significant"
        lines.append((*_where(figure, norm), with_interval(gap), str(gap.n), verdict))
    columns = ("task", "threat", "eps", "defense", f"this minus {reference}", "n", "difference")
    note = (
        f"Paired over examples. {len(pairs)} comparisons: each interval has confidence {confidence:.2%}, so that all "
        "hold together with 95% (Bonferroni)."
    )
    return Table(
        f"Differences from {reference}", columns, tuple(lines), (note,), frozenset((*columns[:4], "difference"))
    )


def seed_tables(folder: str | Path) -> list[Table]:
    """The tables of a folder, see `tables`. Raises CodefendError when it holds no results."""
    return tables(read_seeds(folder), str(read_config(folder)["reference"]))


def write_seeds(folder: str | Path, path: Path) -> None:
    """Write ``path``, Markdown. Each seed's run has its own report. Raises CodefendError as `seed_tables`."""
    lines = [line for table in seed_tables(folder) for line in table.markdown()]
    write_atomic(path, "\n".join(["# Scores over several seeds", "", *lines]))
