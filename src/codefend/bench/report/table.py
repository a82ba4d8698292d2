"""A table of text cells, its renderings for terminals and Markdown, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from codefend.bench.results import Rate
from codefend.tasks.intervals import Interval

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Text cells under ``columns``; ``notes`` are printed below. ``left`` columns are words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: frozenset[str] = frozenset()

    def markdown(self) -> list[str]:
        """The lines of a section of GitHub-flavoured Markdown; none for an empty table."""
        if not self.lines:
            return []
        marks = [":--" if column in self.left else "--:" for column in self.columns]
        lines = [_markdown_line(line) for line in (self.columns, marks, *self.lines)]
        return [f"## {self.title}", "", *lines, "", *(f"- {note}" for note in self.notes), ""]

    def rich(self) -> RichTable:
        """The table for a terminal; a single note becomes its caption, longer legends are for files."""
        from rich.table import Table as RichTable
        from rich.text import Text

        caption = Text(self.notes[0]) if len(self.notes) == 1 else None
        table = RichTable(title=self.title, caption=caption, title_justify="left", caption_justify="left")
        for column in self.columns:
            table.add_column(column, justify="left" if column in self.left else "right", overflow="fold")
        for line in self.lines:
            table.add_row(*(Text(cell) for cell in line))  # Text: answers and labels are no markup
        return table


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def number(value: float | None, digits: int = 2) -> str:
    """Two digits, a dash where nothing was scored."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def with_interval(interval: Interval) -> str:
    """``0.81 [0.70, 0.90]``."""
    return number(interval.mean) + ("" if math.isnan(interval.low) else f" [{interval.low:.2f}, {interval.high:.2f}]")


def rate(value: Rate) -> str:
    """``7/12 (58%)``: always with the denominator."""
    return f"{value.hits}/{value.n} ({value.share:.0%})" if value.n else "–"


def percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"
