"""The report as Markdown, its figures as CSV with unrounded numbers, and all rows as flat CSV or Parquet tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from codefend.bench.report.reading import Report
from codefend.bench.report.tables import (
    all_metrics,
    checks_of,
    costs,
    differences,
    leaderboard,
    metric_mean,
    overview,
    results,
    seen_and_unseen,
    success,
    warnings,
)
from codefend.bench.results import group_rows, worst_rows
from codefend.core.assets import needs
from codefend.core.files import write_atomic
from codefend.core.runs import Row
from codefend.types import CodefendError


def markdown_text(report: Report) -> str:
    """The whole report without images, as GitHub-flavoured Markdown."""
    parts = [f"# Evaluation of {report.victim}", ""]
    if report.missing:
        parts += [f"**Unfinished: {report.missing} rows are missing. Rerun the command to resume.**", ""]
    tables = [overview(report)] if len(report.tasks) > 1 else []
    tables += [leaderboard(report, task) for task in report.tasks]
    tables += [success(report), seen_and_unseen(report), warnings(report), differences(report), costs(report)]
    tables += [table for task in report.tasks for table in (results(report, task), all_metrics(report, task))]
    for table in tables:
        parts += table.markdown()
    return "\n".join(parts)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write one line per row to ``path``, a ``.csv`` or ``.parquet`` file, with columns as in `flat`.

    Raises CodefendError for another ending, or when pyarrow is missing.
    """
    if path.suffix == ".csv":
        write_atomic(path, rows_csv(rows))
    elif path.suffix == ".parquet":
        write_atomic(path, rows_parquet(rows))
    else:
        raise CodefendError(f"{path}: rows are written as .csv or .parquet")


def flat(row: Row) -> Row:
    """``scores.cider_d`` instead of objects in objects; lists become JSON text."""
    columns: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            columns |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        else:
            columns[key] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return columns


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Every column over all rows, None where a row lacks it. A column of mixed numbers is float."""
    lines = [flat(row) for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    table = {name: [line.get(name) for line in lines] for name in names}
    for name, values in table.items():
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            table[name] = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:
            table[name] = [None if value is None else str(value) for value in values]
    return {name: values for name, values in table.items() if any(value is not None for value in values)}


def rows_csv(rows: Sequence[Row]) -> str:
    table = columns_of(rows)
    return _csv(table, zip(*table.values(), strict=True))


def _csv(columns: Iterable[str], lines: Iterable[Sequence[object]]) -> str:
    """CSV in which None and nan are empty cells."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if cell is None or cell != cell else cell for cell in line] for line in lines)
    return stream.getvalue()


def rows_parquet(rows: Sequence[Row]) -> bytes:
    """Raises CodefendError when pyarrow is missing."""
    with needs("a .parquet file, unlike .csv,", "parquet"):
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns_of(rows)), stream)
    return stream.getvalue()


FIGURE_COLUMNS = (
    *("task", "defense", "threat", "attack", "eps", "norm", "metric", "score", "low", "high", "n"),
    *("worst_of_n", "resubmissions", "retained"),
    *("untargeted_hits", "untargeted_n", "targeted_hits", "targeted_n", "warnings"),
)


def csv_text(report: Report) -> str:
    """One line per figure with unrounded numbers, every metric included; nan is left empty."""
    groups = group_rows(report.rows) | worst_rows(group_rows(report.rows))
    metrics = list(dict.fromkeys(name for row in report.rows for name in row["scores"]))
    lines: list[list[object]] = []
    for e in report.entries:
        rows = groups[e.group]
        numbers = [*e.score, e.worst, e.resubmissions, e.retained]
        rates = [e.untargeted.hits, e.untargeted.n, e.targeted.hits, e.targeted.n, checks_of(e.group, report.flags)]
        means = [metric_mean(rows, name) if name in rows[0]["scores"] else math.nan for name in metrics]
        lines.append([*e.group, e.norm, e.metric, *numbers, *rates, *means])
    return _csv([*FIGURE_COLUMNS, *(f"mean_{name}" for name in metrics)], lines)
