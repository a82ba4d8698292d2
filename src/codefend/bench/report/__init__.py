"""Rows to something readable: terminal tables, Markdown, CSV, Parquet, and one HTML file that needs no network.

Every figure is a view of ``rows.jsonl``; nothing is computed here that the rows don't hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from codefend.bench.report import certificates, transfer
from codefend.bench.report.board import write_leaderboard
from codefend.bench.report.exports import csv_text, markdown_text, write_rows
from codefend.bench.report.reading import Report, read_report
from codefend.bench.report.seeds import read_seeds, seed_tables, write_seeds
from codefend.bench.report.table import Table
from codefend.bench.report.tables import overview, summary_tables
from codefend.core.assets import needs
from codefend.core.files import write_atomic
from codefend.core.runs import Row, read_config, read_rows

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


def _kind(run_dir: str | Path) -> Literal["certificates", "seeds", "matrix", "evaluation"]:
    """What a run folder holds. Raises CodefendError when it is none."""
    config = read_config(run_dir)
    if "selection" in config:
        return "certificates"
    return "seeds" if config.get("seeds") else "matrix" if config.get("crafters") else "evaluation"


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write ``out`` (HTML; ``report.html`` in the run folder by default) with a ``.md`` and a ``.csv`` next to it.

    A transfer matrix has no ``.csv``, as each pair's own folder has one; nor have certificates. Several seeds have
    Markdown alone. Returns the file. Raises CodefendError when the folder is no evaluation, or matplotlib or Jinja are
    missing.
    """
    path = Path(out) if out else Path(run_dir) / "report.html"
    path = path / "report.html" if path.is_dir() else path
    match _kind(run_dir):
        case "certificates":
            certificates.write_certificates(run_dir, path)
        case "seeds":
            path = path.with_suffix(".md")
            write_seeds(run_dir, path)
        case "matrix":
            transfer.write_matrix(run_dir, path)
        case _:
            report = read_report(run_dir)
            with needs("the HTML report", "bench"):
                from codefend.bench.report.page import html_text
            write_atomic(path, html_text(report))
            write_atomic(path.with_suffix(".md"), markdown_text(report))
            write_atomic(path.with_suffix(".csv"), csv_text(report))
    return path


def export_rows(run_dir: str | Path, out: str | Path) -> Path:
    """Write every row of a run, or of all pairs of a transfer matrix, as a flat ``.csv`` or ``.parquet`` table.

    Raises CodefendError when the folder is no evaluation, for another ending, or when pyarrow is missing.
    """
    write_rows(_rows(run_dir), Path(out))
    return Path(out)


def _rows(run_dir: str | Path) -> list[Row]:
    match _kind(run_dir):
        case "certificates":
            return read_rows(run_dir)
        case "seeds":
            return read_seeds(run_dir)
        case "matrix":
            return [row for folder in transfer.pair_folders(run_dir) for row in read_report(folder).rows]
        case _:
            return read_report(run_dir).rows


def print_summary(run_dir: str | Path, console: Console) -> None:
    """Print the leaderboards, the results and the warnings, or the tables of seeds, a matrix or certificates."""
    for table in _tables(run_dir, console.width):
        console.print(table.rich())
        console.print()


def _tables(run_dir: str | Path, width: int) -> list[Table]:
    match _kind(run_dir):
        case "certificates":
            return certificates.tables(run_dir)
        case "seeds":
            return seed_tables(run_dir)
        case "matrix":
            return transfer.tables(run_dir)
        case _:
            return summary_tables(read_report(run_dir), width)


def print_overview(run_dir: str | Path, console: Console) -> None:
    """Print one small table: each defense's score on every task, clean and under every threat."""
    console.print(overview(read_report(run_dir)).rich())
