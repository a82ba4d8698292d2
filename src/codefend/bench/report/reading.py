"""A run folder read once for all renderings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codefend.bench.results import Entry, summarize
from codefend.bench.sanity import Flag, check
from codefend.core.runs import Row, read_config, read_rows
from codefend.types import CodefendError


@dataclass(frozen=True)
class Report:
    """Everything that a rendering needs."""

    folder: Path
    config: Row
    bench: Row  # tasks, costs and attacks, as recorded by the evaluation
    rows: list[Row]
    entries: list[Entry]
    flags: list[Flag]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(entry.group.task for entry in self.entries))

    @property
    def victim(self) -> str:
        return str(self.bench.get("victim", self.config.get("victim", "")))

    @property
    def norm(self) -> str:
        return str(self.rows[0]["norm"])

    @property
    def missing(self) -> int:
        """Rows that the evaluation has not made yet."""
        return max(int(self.bench.get("rows", len(self.rows))) - len(self.rows), 0)

    @property
    def warnings(self) -> str:
        """The number of warnings, in words."""
        count = len(self.flags)
        return "no warnings" if not count else f"{count} warning{'s' if count > 1 else ''}, see below"


def read_report(run_dir: str | Path) -> Report:
    """Read a run folder of ``evaluate``. Raises CodefendError when it is none, or holds no rows yet."""
    folder = Path(run_dir)
    config = read_config(folder)
    if not (folder / "rows.jsonl").exists() or not (folder / "bench.json").exists():
        raise CodefendError(f"{folder} holds no evaluation; make one with `codefend eval --run {folder}`")
    rows = read_rows(folder)
    if not rows:
        raise CodefendError(f"{folder} has no results yet; rerun `codefend eval --run {folder}` to resume")
    if config.get("photographs") is True:  # the format of photographs until 2026-11-29
        raise CodefendError(
            f"{folder} holds photographs evaluated by an older version; its table is {folder / 'photographs.md'}, "
            "for a report evaluate again in another folder"
        )
    if any("defense" not in row or "mean_scores" not in row for row in rows):
        raise CodefendError(f"{folder} holds rows of something else than an evaluation")
    try:
        bench: dict[str, Any] = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CodefendError(
            f"{folder / 'bench.json'} is damaged ({error}); remove it and rerun the evaluation"
        ) from error
    return Report(folder, config, bench, rows, summarize(rows), check(rows))
