"""Write and print the report of a run folder: one run, several seeds, a transfer matrix or certificates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from codefend.bench.report.board import write_board
from codefend.bench.report.certificates import is_certified, print_certificates, write_certificates
from codefend.bench.report.exports import csv_text, markdown_text, write_rows
from codefend.bench.report.reading import read_report
from codefend.bench.report.seeds import is_seeds, print_seeds, read_seeds, write_seeds
from codefend.bench.report.tables import overview, summary_tables
from codefend.bench.report.transfer import is_matrix, pair_folders, print_matrix, write_matrix
from codefend.core.files import write_atomic
from codefend.core.runs import read_rows
from codefend.types import CodefendError

if TYPE_CHECKING:
    from rich.console import Console


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write ``out`` (HTML; ``report.html`` in the run folder by default) with a ``.md`` and a ``.csv`` next to it.

    A transfer matrix has no ``.csv``, as each pair's own folder has one; nor have certificates. Several seeds have
    Markdown alone. Returns the file. Raises CodefendError when the folder is no evaluation, or matplotlib or Jinja are
    missing.
    """
    if is_certified(run_dir):
        return write_certificates(run_dir, out)
    if is_seeds(run_dir):
        return write_seeds(run_dir, out)
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
    if is_certified(run_dir):
        write_rows(read_rows(run_dir), Path(out))
        return Path(out)
    if is_seeds(run_dir):
        write_rows(read_seeds(run_dir), Path(out))
        return Path(out)
    folders = pair_folders(run_dir) if is_matrix(run_dir) else [Path(run_dir)]
    write_rows([row for folder in folders for row in read_report(folder).rows], Path(out))
    return Path(out)


def print_summary(run_dir: str | Path, console: Console) -> None:
    """Print the leaderboards, the results and the warnings, or the tables of a transfer matrix."""
    if is_certified(run_dir):
        print_certificates(run_dir, console)
        return
    if is_seeds(run_dir):
        print_seeds(run_dir, console)
        return
    if is_matrix(run_dir):
        print_matrix(run_dir, console)
        return
    for table in summary_tables(read_report(run_dir), console.width):
        console.print(table.rich())
        console.print()


def print_overview(run_dir: str | Path, console: Console) -> None:
    """Print one small table: each defense's score on every task, clean and under every threat."""
    console.print(overview(read_report(run_dir)).rich())


def write_leaderboard(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Rank the defenses of several runs on one page, ``out`` (HTML) with a ``.md`` next to it; returns the HTML file.

    Raises CodefendError when a folder is no evaluation, or Jinja is missing.
    """
    return write_board(run_dirs, out)
