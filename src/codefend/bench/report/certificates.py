"""The report of certificates: certified accuracy against radius, as tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from codefend.bench.report.table import Table, number, with_interval
from codefend.bench.smoothing import lower_bound
from codefend.core.assets import needs
from codefend.core.files import write_atomic
from codefend.core.runs import Row, read_config, read_rows
from codefend.tasks.intervals import Interval, share_interval
from codefend.types import CodefendError

RADII = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # l2, pixels in [0, 1]
NOTES = (
    "certified accuracy at r: share of the examples whose smoothed answer is right and has a certified radius above r "
    "(l2, pixels in [0, 1]); abstentions count as wrong. Brackets: Wilson's 95% interval over examples.",
    "Each certificate is wrong with probability alpha at most. A caption's objects are certified together: alpha is "
    "divided by the number of objects of the task (Bonferroni).",
    "A certificate holds for the vote over many noisy draws, not for a single answer, and in real arithmetic.",
)


@dataclass(frozen=True)
class Curve:
    """The certificates of one defense on one task, by what they say of the image."""

    task: str
    defense: str
    rows: list[Row]
    right: str = "right"  # the columns of the rows that are read
    radius: str = "radius"

    def certified(self, at: float) -> Interval:
        """Certified accuracy at radius ``at``."""
        certified = sum(row[self.right] and row[self.radius] > at for row in self.rows)
        return share_interval(certified, len(self.rows))


def read_curves(folder: str | Path) -> list[Curve]:
    """All curves of a run. Raises CodefendError when it has no rows yet."""
    if curves := curves_of(read_rows(folder)):
        return curves
    raise CodefendError(f"{folder} has no certificates yet; rerun `codefend certify --run {folder}` to resume")


def curves_of(rows: Iterable[Row]) -> list[Curve]:
    """The curves of these rows, by task."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["defense"]), []).append(row)
    curves = []
    for (task, defense), rows in groups.items():
        if "objects" in rows[0]:
            curves += [
                Curve(f"{task}: every object is named", defense, rows),
                Curve(f"{task}: every object is named, and no other", defense, rows, "exact", "exact_radius"),
            ]
        else:
            curves.append(Curve(task, defense, rows))
    return sorted(curves, key=lambda curve: curve.task)


def tables(folder: str | Path) -> list[Table]:
    """Certified accuracy of a run at a few radii, a table for each task."""
    return tables_of(read_curves(folder), float(read_config(folder)["alpha"]))


def tables_of(curves: Sequence[Curve], alpha: float) -> list[Table]:
    """Certified accuracy at a few radii, a table for each task; ``alpha`` is that of the certificates."""
    titles = dict.fromkeys(curve.task for curve in curves)
    return [_table(title, [c for c in curves if c.task == title], alpha) for title in titles]


def _table(title: str, curves: Sequence[Curve], alpha: float) -> Table:
    lines = []
    for curve in curves:
        rows = curve.rows
        right = sum(bool(row[curve.right]) for row in rows) / len(rows)
        abstained = sum(row[curve.radius] == 0 for row in rows) / len(rows)
        share = alpha / max(1, len(rows[0].get("objects") or ()))  # of one object's statement
        most = rows[0]["sigma"] * NormalDist().inv_cdf(lower_bound(rows[0]["draws"], rows[0]["draws"], share))
        certified = [with_interval(curve.certified(radius)) for radius in RADII]
        counts = (str(len(rows)), str(rows[0]["draws"]))
        lines.append((curve.defense, f"{rows[0]['sigma']:.3g}", *counts, number(right), number(abstained), *certified))
        lines[-1] += (number(most),)
    columns = ("defense", "sigma", "n", "draws", "accuracy", "abstained", *(f"r = {r:g}" for r in RADII), "largest r")
    return Table(title, columns, tuple(lines), NOTES, frozenset({"defense"}))


def write_certificates(folder: str | Path, path: Path) -> None:
    """Write ``path`` (HTML) with a ``.md`` next to it.

    Raises CodefendError when the folder holds no certificates, or matplotlib or Jinja are missing.
    """
    with needs("the HTML report", "bench"):
        from codefend.bench.report.page import inline, render
        from codefend.bench.report.plots import certified_accuracy
    curves, parts = read_curves(folder), tables(folder)
    plots = [inline(certified_accuracy([c for c in curves if c.task == table.title])) for table in parts]
    write_atomic(path, render("certificates.html", tables=list(zip(parts, plots, strict=True)), notes=NOTES))
    lines = ["# Certified answers", "", *(f"- {note}" for note in NOTES), ""]
    lines += [line for table in parts for line in table.markdown() if not line.startswith("- ")]
    write_atomic(path.with_suffix(".md"), "\n".join(lines))
