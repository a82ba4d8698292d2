"""Rows to something readable: terminal tables, Markdown, CSV, Parquet, and one HTML file that needs no network.

Every figure is a view of ``rows.jsonl``; nothing is computed here that the rows don't hold.
"""

from __future__ import annotations

from codefend.bench.report.reading import Report, read_report
from codefend.bench.report.writing import export_rows, print_overview, print_summary, write_leaderboard, write_report

__all__ = [
    "Report",
    "export_rows",
    "print_overview",
    "print_summary",
    "read_report",
    "write_leaderboard",
    "write_report",
]
