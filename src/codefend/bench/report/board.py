"""The leaderboard page: defenses of one or several runs, ranked by their worst case, with the rules.

Only runs under the same conditions share a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from codefend.bench.report.reading import Report, read_report
from codefend.bench.report.table import Table
from codefend.bench.report.tables import RULES, THREAT_WORDS, differences, leaderboard
from codefend.bench.results import BARE, summarize
from codefend.bench.sanity import check
from codefend.core.assets import needs
from codefend.core.files import write_atomic
from codefend.core.runs import Row
from codefend.types import CodefendError

CONDITIONS: tuple[str, ...] = (
    *("victim", "craft_victim", "split", "limit", "adaptive_limit", "norm", "eps", "attacks", "steps"),
    *("eot", "restarts", "resubmissions", "threats", "surrogate", "target", "seed"),
    *("sample", "encoders", "side", "photographs"),
)
ENTRY = (
    "A defense enters by a run of `codefend eval` under the conditions of the table; other conditions make another "
    "table. Its name holds its purifier, its prompt and their options; the attacker at T2 knows all of them.",
    "A figure with warnings keeps its rank; examine the warnings before relying on it.",
)


@dataclass(frozen=True)
class Board:
    """One table with the conditions that all its runs share."""

    table: Table
    conditions: str
    differences: Table  # paired, from the best


def read_boards(run_dirs: Sequence[str | Path]) -> list[Board]:
    """The tables of several runs. Raises CodefendError when none is given or one is no evaluation."""
    if not run_dirs:
        raise CodefendError("name the run folders to rank")
    by_conditions: dict[str, list[Report]] = {}
    for folder in dict.fromkeys(Path(run_dir).resolve() for run_dir in run_dirs):
        report = read_report(folder)
        by_conditions.setdefault(conditions(report.config), []).append(report)
    boards = []
    for words, reports in by_conditions.items():
        merged = merge(reports)
        gaps = differences(merged)
        for task in merged.tasks:
            mine = replace(gaps, title="", lines=tuple(line for line in gaps.lines if line[0] == task))
            boards.append(Board(leaderboard(merged, task), words, mine))
    return boards


def conditions(config: Row) -> str:
    """What a figure depends on other than the defense, in words."""
    parts = []
    for key in CONDITIONS:
        value = config.get(key)
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        parts += [f"{key} {text}"] if value not in (None, "", 0) or key == "seed" else []
    return "; ".join(parts)


def merge(reports: Sequence[Report]) -> Report:
    """Runs under the same conditions as one report.

    A defense that several runs have gets its run folder's name, with as many parent folders as it takes.
    """
    rows: list[Row] = []
    taken: set[tuple[str, str]] = set()
    for report in reports:
        mine = {(row["task"], row["defense"]) for row in report.rows}
        names = {key: key[1] if key[1] == BARE else _untaken(key, report.folder, taken) for key in mine}
        again = {key for key in mine if key in taken and key[1] == BARE}
        rows += [
            row | {"defense": names[row["task"], row["defense"]]}
            for row in report.rows
            if (row["task"], row["defense"]) not in again
        ]
        taken |= {(task, names[task, defense]) for task, defense in mine}
    first = reports[0]
    return Report(first.folder, first.config, first.bench, rows, summarize(rows), check(rows))


def _untaken(key: tuple[str, str], folder: Path, taken: set[tuple[str, str]]) -> str:
    task, defense = key
    parts = folder.resolve().parts
    longer = (f"{defense} ({'/'.join(parts[-count:])})" for count in range(1, len(parts) + 1))
    return next(name for name in (defense, *longer) if (task, name) not in taken)


def write_leaderboard(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Rank the defenses of several runs on one page, ``out`` (HTML) with a ``.md`` next to it; returns the HTML file.

    Raises CodefendError when a folder is no evaluation, or Jinja is missing.
    """
    with needs("the leaderboard", "bench"):
        from codefend.bench.report.page import render
    boards, path = read_boards(run_dirs), Path(out)
    words = [f"{threat}: {text}." for threat, text in THREAT_WORDS.items()]
    rules = [*RULES, *ENTRY, *words]
    lines = ["# Leaderboard", ""]
    for board in boards:
        title, *body = (line for line in board.table.markdown() if line.startswith(("#", "|")))
        lines += [title, "", f"Conditions: {board.conditions}", "", *body, ""]
        if board.differences.lines:
            body = [line for line in board.differences.markdown() if line.startswith("|")]
            lines += [*board.differences.notes, "", *body, ""]
    lines += ["## Rules", "", *(f"- {rule}" for rule in rules), ""]
    write_atomic(path, render("board.html", boards=boards, rules=rules))
    write_atomic(path.with_suffix(".md"), "\n".join(lines))
    return path
