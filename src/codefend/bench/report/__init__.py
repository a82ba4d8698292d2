"""Rows to something readable: terminal tables, Markdown, CSV, and one HTML file that needs no network.

Every figure is a view of ``rows.jsonl``; nothing is computed here that the rows don't hold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codefend.bench.results import Entry, summarize
from codefend.bench.sanity import Flag, check
from codefend.core.files import write_atomic
from codefend.core.runs import Row, read_config, read_rows
from codefend.types import CodefendError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Report",
    "export_rows",
    "print_overview",
    "print_summary",
    "read_report",
    "write_leaderboard",
    "write_report",
]


@dataclass(frozen=True)
class Report:
    """Everything that a rendering needs, read once."""

    folder: Path
    config: Row
    bench: Row  # tasks, costs and attacks as the evaluation found them
    rows: list[Row]
    entries: list[Entry]
    flags: list[Flag]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(entry.group.task for entry in self.entries))

    @property
    def missing(self) -> int:
        """Rows that the evaluation has still to make."""
        return max(int(self.bench.get("rows", len(self.rows))) - len(self.rows), 0)

    @property
    def doubts_in_words(self) -> str:
        count = len(self.flags)
        return "no doubts" if not count else f"{count} doubt{'s' if count > 1 else ''}, see below"


def read_report(run_dir: str | Path) -> Report:
    """Read a run folder of ``evaluate``. Raises CodefendError when it is none, or holds no rows yet."""
    folder = Path(run_dir)
    config = read_config(folder)
    if not (folder / "rows.jsonl").exists() or not (folder / "bench.json").exists():
        raise CodefendError(f"{folder} holds no evaluation; make one with `codefend eval --run {folder}`")
    rows = read_rows(folder)
    if not rows:
        raise CodefendError(f"{folder} has no results yet; run `codefend eval --run {folder}` again to go on")
    if any("defense" not in row or "mean_scores" not in row for row in rows):
        raise CodefendError(f"{folder} holds rows of something else than an evaluation")
    try:
        bench: dict[str, Any] = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CodefendError(
            f"{folder / 'bench.json'} is damaged ({error}); remove it and run the evaluation again"
        ) from error
    return Report(folder, config, bench, rows, summarize(rows), check(rows))


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write ``out`` (HTML; ``report.html`` in the run folder by default) with a ``.md`` and a ``.csv`` beside it.

    A transfer matrix has no ``.csv``: each pair's own folder has. Returns the HTML file. Raises CodefendError when the
    folder is no evaluation, or matplotlib or Jinja are missing.
    """
    from codefend.bench.report.exports import csv_text, markdown_text
    from codefend.bench.report.transfer import is_matrix, write_matrix

    if is_matrix(run_dir):
        return write_matrix(run_dir, out)
    report = read_report(run_dir)
    path = Path(out) if out else report.folder / "report.html"
    path = path / "report.html" if path.is_dir() else path
    try:
        from codefend.bench.report.page import html_text
    except ModuleNotFoundError as error:
        raise CodefendError(f"the HTML report needs {error.name}: pip install 'codefend[bench]'") from error
    write_atomic(path, html_text(report))
    write_atomic(path.with_suffix(".md"), markdown_text(report))
    write_atomic(path.with_suffix(".csv"), csv_text(report))
    return path


def export_rows(run_dir: str | Path, out: str | Path) -> Path:
    """Write every row of a run, or of all pairs of a transfer matrix, as a flat ``.csv`` or ``.parquet`` table.

    Raises CodefendError when the folder is no evaluation, for another ending, or when pyarrow is missing.
    """
    from codefend.bench.report.exports import write_rows
    from codefend.bench.report.transfer import is_matrix, pair_folders

    folders = pair_folders(run_dir) if is_matrix(run_dir) else [Path(run_dir)]
    write_rows([row for folder in folders for row in read_report(folder).rows], Path(out))
    return Path(out)


def print_summary(run_dir: str | Path, console: Console) -> None:
    """Show the leaderboards, the results and the doubts on a terminal, or the tables of a transfer matrix."""
    from codefend.bench.report.tables import rich_table, summary_tables
    from codefend.bench.report.transfer import is_matrix, print_matrix

    if is_matrix(run_dir):
        print_matrix(run_dir, console)
        return
    for table in summary_tables(read_report(run_dir)):
        console.print(rich_table(table))
        console.print()


def write_leaderboard(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Rank the defenses of several runs on one page, ``out`` (HTML) with a ``.md`` beside it; the HTML's path.

    Raises CodefendError when a folder is no evaluation, or Jinja is missing.
    """
    from codefend.bench.report.board import write_board

    return write_board(run_dirs, out)


def print_overview(run_dir: str | Path, console: Console) -> None:
    """Show one small table on a terminal: each defense's score on every task, clean and under every threat."""
    from codefend.bench.report.tables import overview, rich_table

    console.print(rich_table(overview(read_report(run_dir))))
