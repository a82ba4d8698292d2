"""A transfer matrix: how far attacks made on one victim carry to another, as heat maps and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codefend.bench.report import Report, read_report
from codefend.bench.report.tables import Table, number, rate, with_interval
from codefend.bench.results import CLEAN, WORST, Entry, Rate, eps_label, success_rates
from codefend.core.files import write_atomic
from codefend.core.runs import read_config
from codefend.types import CodefendError

if TYPE_CHECKING:
    from rich.console import Console

NOTES = (
    "success: of the images that the judge answers right through this defense when nobody attacks, those on which any "
    "attack, in any submission, made the answer wrong or its target appear; worst case over the attacks.",
    "Attacks see the bare crafter and no defense. On the diagonal the judge is the crafter: oblivious attacks (T0); "
    "elsewhere transfer (T1).",
)


@dataclass(frozen=True)
class Meeting:
    """Attacks made on ``crafter``, judged on ``judge``: one cell of a heat map."""

    task: str
    defense: str
    eps: float
    norm: str
    crafter: str
    judge: str
    success: Rate
    clean: Entry
    attacked: Entry


def is_matrix(folder: str | Path) -> bool:
    """Whether ``folder`` is a transfer matrix's. Raises CodefendError when it is no run folder."""
    return bool(read_config(folder).get("crafters"))


def pair_folders(folder: str | Path) -> list[Path]:
    """The runs of a matrix that have begun. Raises CodefendError when none has."""
    pairs = sorted(path.parent for path in Path(folder).glob("*/bench.json"))
    pairs = [pair for pair in pairs if (pair / "rows.jsonl").stat().st_size]
    if not pairs:
        raise CodefendError(f"{folder} has no results yet; run `codefend eval --run {folder}` again to go on")
    return pairs


def read_matrix(folder: str | Path) -> tuple[list[Meeting], int]:
    """All cells of a matrix, and how many rows are still to come. Raises CodefendError when no pair has results yet."""
    config, pairs = read_config(folder), pair_folders(folder)
    names = [*config["crafters"], *config["judges"]]
    meetings: list[Meeting] = []
    reports = [read_report(pair) for pair in pairs]
    for report in reports:
        meetings += _meetings(report)
    crafters = len(config["crafters"])
    expected = crafters * len(names)
    missing = sum(report.missing for report in reports) + (expected - len(reports)) * max(
        int(report.bench.get("rows", 0)) for report in reports
    )
    return sorted(meetings, key=lambda m: (names.index(m.crafter), names.index(m.judge))), missing


def _meetings(report: Report) -> list[Meeting]:
    rates = success_rates(report.rows)
    clean = {(e.group.task, e.group.defense): e for e in report.entries if e.group.attack == CLEAN}
    judge = str(report.config["victim"])
    crafter = str(report.config.get("craft_victim") or judge)
    return [
        Meeting(
            task=e.group.task,
            defense=e.group.defense,
            eps=e.group.eps,
            norm=e.norm,
            crafter=crafter,
            judge=judge,
            success=rates[e.group],
            clean=clean[e.group.task, e.group.defense],
            attacked=e,
        )
        for e in report.entries
        if e.group.attack == WORST
    ]


def maps(meetings: list[Meeting]) -> dict[str, list[Meeting]]:
    """The cells of each heat map, by its title."""
    found: dict[str, list[Meeting]] = {}
    for m in meetings:
        size = eps_label(m.eps, m.norm)
        title = f"{m.task}, defense {m.defense}" + (f", {size}" if size else ", attacks with a bound of their own")
        found.setdefault(title, []).append(m)
    return found


def table(meetings: list[Meeting], title: str) -> Table:
    """One line per cell, with all denominators."""
    lines = [
        (
            m.crafter,
            m.judge,
            rate(m.success),
            with_interval(m.clean.score),
            with_interval(m.attacked.score),
            str(m.attacked.score.n),
            number(m.attacked.kept),
        )
        for m in meetings
    ]
    columns = ("made on", "judged on", "success", "clean score", "attacked score", "n", "kept")
    return Table(title, columns, tuple(lines), (), frozenset(columns[:2]))


def write_matrix(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write ``out`` (HTML; ``report.html`` in the folder by default) with a ``.md`` beside it; the HTML's path.

    Raises CodefendError when the folder holds no results, or matplotlib or Jinja are missing.
    """
    meetings, missing = read_matrix(folder)
    path = Path(out) if out else Path(folder) / "report.html"
    path = path / "report.html" if path.is_dir() else path
    try:
        from codefend.bench.report.exports import markdown
        from codefend.bench.report.page import inline, render
        from codefend.bench.report.plots import heat_map
    except ModuleNotFoundError as error:
        raise CodefendError(f"the HTML report needs {error.name}: pip install 'codefend[bench]'") from error
    tables = [table(found, title) for title, found in maps(meetings).items()]
    plots = [inline(heat_map(found)) for found in maps(meetings).values()]
    text = render("transfer.html", tables=list(zip(tables, plots, strict=True)), notes=NOTES, missing=missing)
    lines = ["# Transfer of attacks", "", *(f"- {note}" for note in NOTES), ""]
    unfinished = [f"**Unfinished: about {missing} rows are still to come.**", ""] if missing else []
    write_atomic(path, text)
    write_atomic(
        path.with_suffix(".md"), "\n".join([*lines, *unfinished, *(line for t in tables for line in markdown(t))])
    )
    return path


def print_matrix(folder: str | Path, console: Console) -> None:
    """Show the tables on a terminal."""
    from codefend.bench.report.tables import rich_table

    for title, found in maps(read_matrix(folder)[0]).items():
        console.print(rich_table(table(found, title)))
        console.print()
