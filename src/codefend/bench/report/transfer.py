"""The report of a transfer matrix: success of attacks crafted on one victim and evaluated on another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codefend.bench.report.reading import Report, read_report
from codefend.bench.report.table import Table, percent, rate, with_interval
from codefend.bench.results import CLEAN, WORST, Entry, Rate, eps_label, success_rates
from codefend.core.assets import needs
from codefend.core.files import write_atomic
from codefend.core.runs import read_config
from codefend.types import CodefendError

NOTES = (
    "attack success rate: share of the images that the evaluated victim answers correctly behind this defense without "
    "attack, on which any attack, in any submission, made the answer wrong or its target appear.",
    "Attacks are crafted on the undefended victim. On the diagonal both victims are the same: oblivious attacks (T0); "
    "elsewhere transfer attacks (T1).",
)


@dataclass(frozen=True)
class TransferCell:
    """Attacks crafted on ``crafter``, evaluated on ``judge``: one cell of a heat map."""

    task: str
    defense: str
    eps: float
    norm: str
    crafter: str
    judge: str
    success: Rate
    clean: Entry
    attacked: Entry


def pair_folders(folder: str | Path) -> list[Path]:
    """The runs of a matrix that have begun. Raises CodefendError when none has."""
    pairs = sorted(path.parent for path in Path(folder).glob("*/bench.json"))
    pairs = [pair for pair in pairs if (pair / "rows.jsonl").stat().st_size]
    if not pairs:
        raise CodefendError(f"{folder} has no results yet; rerun `codefend eval --run {folder}` to resume")
    return pairs


def read_matrix(folder: str | Path) -> tuple[list[TransferCell], int]:
    """All cells of a matrix, and how many rows are missing. Raises CodefendError when no pair has results yet."""
    config, pairs = read_config(folder), pair_folders(folder)
    names = [*config["crafters"], *config["judges"]]
    reports = [read_report(pair) for pair in pairs]
    cells = [cell for report in reports for cell in _cells(report)]
    absent = len(config["crafters"]) * len(names) - len(reports)
    missing = sum(report.missing for report in reports)
    missing += absent * max(int(report.bench.get("rows", 0)) for report in reports)
    return sorted(cells, key=lambda cell: (names.index(cell.crafter), names.index(cell.judge))), missing


def _cells(report: Report) -> list[TransferCell]:
    rates = success_rates(report.rows)
    clean = {(e.group.task, e.group.defense): e for e in report.entries if e.group.attack == CLEAN}
    judge = str(report.config["victim"])
    crafter = str(report.config.get("craft_victim") or judge)
    return [
        TransferCell(
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


def tables(folder: str | Path) -> list[Table]:
    """A table for each heat map."""
    return [table(cells, title) for title, cells in maps(read_matrix(folder)[0]).items()]


def maps(cells: list[TransferCell]) -> dict[str, list[TransferCell]]:
    """The cells of each heat map, by its title."""
    by_title: dict[str, list[TransferCell]] = {}
    for cell in cells:
        size = eps_label(cell.eps, cell.norm) or "attacks with a bound of their own"
        by_title.setdefault(f"{cell.task}, defense {cell.defense}, {size}", []).append(cell)
    return by_title


def table(cells: list[TransferCell], title: str) -> Table:
    """One line per cell, with all denominators."""
    lines = [
        (
            cell.crafter,
            cell.judge,
            rate(cell.success),
            with_interval(cell.clean.score),
            with_interval(cell.attacked.score),
            str(cell.attacked.score.n),
            percent(cell.attacked.retained),
        )
        for cell in cells
    ]
    columns = ("crafted on", "evaluated on", "attack success", "clean score", "robust score", "n", "of clean")
    return Table(title, columns, tuple(lines), (), frozenset(columns[:2]))


def write_matrix(folder: str | Path, path: Path) -> None:
    """Write ``path`` (HTML) with a ``.md`` next to it.

    Raises CodefendError when the folder holds no results, or matplotlib or Jinja are missing.
    """
    cells, missing = read_matrix(folder)
    with needs("the HTML report", "bench"):
        from codefend.bench.report.page import inline, render
        from codefend.bench.report.plots import heat_map
    parts = [table(members, title) for title, members in maps(cells).items()]
    plots = [inline(heat_map(members)) for members in maps(cells).values()]
    text = render("transfer.html", tables=list(zip(parts, plots, strict=True)), notes=NOTES, missing=missing)
    lines = ["# Transfer of attacks between victims", "", *(f"- {note}" for note in NOTES), ""]
    lines += [f"**Unfinished: about {missing} rows are missing. Rerun the command to resume.**", ""] if missing else []
    lines += [line for part in parts for line in part.markdown()]
    write_atomic(path, text)
    write_atomic(path.with_suffix(".md"), "\n".join(lines))
